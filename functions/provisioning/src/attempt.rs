//! An attempt at a tenant's collection: made under the tenant's claim, and taken back if the record does
//! not come to name it.

use std::collections::BTreeMap;
use std::time::Duration;

use shared::aws::StoreError;
use shared::error::{ApiError, Code};
use shared::ledger::Record;
use shared::placement::{CLAIM_MS, Claim, Offer, by_room, said};
use shared::scope::Operator;
use shared::tenant::{EmbeddingModel, Tenant, TenantId};
use shared::vectors::VectorError;
use tokio::time::error::Elapsed;
use tokio::time::{Instant, timeout_at};

use crate::Context;

/// How long an attempt may work, and how long it may take with what is taken back. The claim holds
/// [`CLAIM_MS`]: nobody else takes it while this attempt can still do anything, whatever the clocks say.
const WORK: Duration = Duration::from_secs(18);
const WHOLE: Duration = Duration::from_secs(25);

/// An attempt under way.
pub(crate) struct Attempt<'a> {
    context: &'a Context,
    operator: &'a Operator,
    pub(crate) claim: Claim,
    begun: Instant,
    /// Whether a call that makes or removes a collection is out: unanswered, it may arrive at any time.
    in_doubt: bool,
}

impl<'a> Attempt<'a> {
    /// Takes the claim.
    ///
    /// # Errors
    /// 409 if another attempt has it.
    pub(crate) async fn begin(
        context: &'a Context,
        operator: &'a Operator,
        tenant: &TenantId,
    ) -> Result<Self, ApiError> {
        let (begun, now, mut rng) = (Instant::now(), context.clock.now(), context.entropy);
        let claim = match context.tenants.claim(operator, tenant, now, &mut rng).await {
            Ok(claim) => claim,
            Err(StoreError::Conflict) => {
                let message = format!(
                    "tenant `{tenant}` is being made or moved by another request, or was until a moment ago"
                );
                let retry_after_ms = Some(CLAIM_MS);
                return Err(ApiError { retry_after_ms, ..ApiError::new(Code::Conflict, message) });
            }
            Err(error) => return Err(error.into()),
        };
        Ok(Self { context, operator, claim, begun, in_doubt: false })
    }

    /// Until when the attempt may work.
    pub(crate) fn works_until(&self) -> Instant {
        self.begun + WORK
    }

    /// Concludes what was done in the time that there was. If it failed, what was made is taken back.
    ///
    /// # Errors
    /// That of the work, or that there was no time.
    pub(crate) async fn conclude<T>(
        &mut self,
        outcome: Result<Result<T, ApiError>, Elapsed>,
    ) -> Result<T, ApiError> {
        let error = match outcome {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(error)) => error,
            Err(_) => {
                self.in_doubt = true;
                ApiError::new(Code::DeadlineExceeded, "there was no time to finish; try again")
            }
        };
        if timeout_at(self.begun + WHOLE, self.undo()).await.is_err() {
            tracing::warn!(tenant.id = %self.claim.tenant_id, "What a failed attempt made is left to the next");
        }
        Err(error)
    }

    /// Removes what this attempt made, and ends the claim if nothing can be left. Otherwise the claim stays
    /// as it is: it ends by itself, and names the cells to whoever is next.
    async fn undo(&mut self) {
        let mut rng = self.context.entropy;
        match self.context.tenants.withdraw(&mut self.claim, &mut rng).await {
            Ok(()) => {}
            // The record stands after all, or the claim is another's. Either way nothing here is ours.
            Err(StoreError::Conflict) => return,
            Err(error) => {
                tracing::warn!("What a failed attempt made is left to the next: {error}");
                return;
            }
        }
        let cleared = self.clear().await;
        if let Err(error) = &cleared {
            tracing::warn!("What a failed attempt made is left to the next: {error}");
        }
        if cleared.is_ok() && !self.in_doubt {
            self.release().await;
        }
    }

    /// Removes what was left in the cells that the claim names. What is not empty is nobody's to remove
    /// here; it fails whoever wants to place the tenant beside it, and not those who take back their own.
    async fn clear(&mut self) -> Result<(), VectorError> {
        for cell in self.claim.cells.clone() {
            match self.remove(&cell).await {
                Ok(()) | Err(VectorError::NotEmpty { .. }) => {}
                Err(VectorError::UnknownCell(_)) => {
                    tracing::warn!(cell, "A cell where something may be left is configured no more");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn remove(&mut self, cell: &str) -> Result<(), VectorError> {
        let Context { cells, vector_root_key, .. } = self.context;
        cells.remove_empty(self.operator, vector_root_key, cell, &self.claim.tenant_id).await
    }

    /// The tenant's passages in a cell.
    pub(crate) async fn passages(&self, cell: &str) -> Result<u64, ApiError> {
        let Context { cells, vector_root_key, .. } = self.context;
        let passages = cells.passages(self.operator, vector_root_key, cell, &self.claim.tenant_id).await?;
        Ok(passages.unwrap_or(0))
    }

    /// Makes a new, empty collection, in the cell that is `named` or in the one with the most room, and
    /// says where. What earlier attempts left is removed before.
    ///
    /// A cell's collections are counted again once this one is among them: of those that are placed at the
    /// same moment none stays beyond the cell's capacity, since the last to count counts all.
    ///
    /// # Errors
    /// 400 for a cell that does not exist, 409 for one that does not take the tenant, 503 if none does.
    pub(crate) async fn house(
        &mut self,
        named: Option<&str>,
        model: &EmbeddingModel,
    ) -> Result<String, ApiError> {
        let (context, operator) = (self.context, self.operator);
        let (cells, key, tenant) = (&context.cells, &context.vector_root_key, self.claim.tenant_id.clone());
        self.clear().await?;
        let mut offers = match cells.survey(operator, key, &tenant, named).await {
            Err(VectorError::UnknownCell(cell)) => return Err(unknown(context, &cell)),
            surveyed => surveyed?,
        };
        for cell in by_room(&offers) {
            context.tenants.claim_cell(&mut self.claim, &cell).await?;
            self.remove(&cell).await?;
            self.in_doubt = true;
            cells.create_collection(operator, key, &cell, &tenant, model).await?;
            self.in_doubt = false;
            if !cells.overfull(operator, key, &cell).await? {
                return Ok(cell);
            }
            self.remove(&cell).await?;
            offers.insert(cell, Offer::Full);
        }
        Err(no_room(named, &offers))
    }

    /// Enters a tenant's record that names the new cell in the place of the one that it was in: from here
    /// on it is there, or it never will be by this attempt. The old cell is left for [`Attempt::finish`].
    ///
    /// # Errors
    /// As [`shared::aws::tenants::TenantStore::relocate`].
    pub(crate) async fn relocate(
        &mut self,
        was: &Tenant,
        now: &Tenant,
        record: &Record,
    ) -> Result<(), ApiError> {
        let (tenants, mut rng) = (&self.context.tenants, self.context.entropy);
        let mut left = self.claim.renamed(&mut rng);
        left.cells.remove(&now.cell);
        left.cells.insert(was.cell.clone());
        let ledger = (&self.context.ledger, record);
        let entered = tenants.relocate(self.operator, &self.claim, &left, was, now, ledger).await;
        if let Err(error) = entered {
            match tenants.withdraw(&mut self.claim, &mut rng).await {
                Err(StoreError::Conflict) => {
                    // It was done, and only the answer was lost; or somebody else has the claim.
                    let is = tenants.get(self.operator, &was.tenant_id).await?;
                    if is.as_ref() != Some(now) {
                        return Err(error.into());
                    }
                }
                Ok(()) | Err(_) => return Err(error.into()),
            }
        }
        self.claim = left;
        Ok(())
    }

    /// Ends a claim whose work is done: what it still names is removed first.
    pub(crate) async fn finish(&mut self) {
        match timeout_at(self.begun + WHOLE, self.clear()).await {
            Ok(Ok(())) => self.release().await,
            Ok(Err(error)) => tracing::warn!("A collection that is not used any more is left: {error}"),
            Err(_) => tracing::warn!("A collection that is not used any more is left: there was no time"),
        }
    }

    async fn release(&self) {
        if let Err(error) = self.context.tenants.release(&self.claim).await {
            tracing::warn!("A claim is left to end by itself: {error}");
        }
    }
}

/// A cell that is named has to be one of those that there are.
pub(crate) fn check_cell(context: &Context, named: Option<&str>) -> Result<(), ApiError> {
    match named {
        Some(cell) if !context.cells.names().any(|name| name == cell) => Err(unknown(context, cell)),
        _ => Ok(()),
    }
}

fn unknown(context: &Context, cell: &str) -> ApiError {
    let names: Vec<&str> = context.cells.names().collect();
    ApiError::invalid("cell", format!("there is no cell `{cell}`; there are {}", names.join(", ")))
}

fn no_room(named: Option<&str>, offers: &BTreeMap<String, Offer>) -> ApiError {
    let silent = offers.values().any(|offer| *offer == Offer::Silent);
    match named {
        Some(_) if !silent => {
            ApiError::new(Code::Conflict, format!("cell {}", said(offers))).with_param("cell")
        }
        _ => ApiError::new(Code::Unavailable, format!("no cell takes the tenant: {}", said(offers))),
    }
}
