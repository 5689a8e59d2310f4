//! The processes that wait for work, of all functions together.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::instance::Instance;
use super::lock;
use super::pool::Pool;

/// In the order in which they ended their last work.
#[derive(Debug, Default)]
pub(super) struct Idle(Mutex<Vec<Arc<Instance>>>);

impl Idle {
    /// A process of that function and tenant gets work: the one that worked last, so that the others can
    /// be ended.
    pub(super) fn take(&self, pool: &Pool, tenant: Option<&str>) -> Option<Arc<Instance>> {
        let mut idle = lock(&self.0);
        let serves = |it: &Arc<Instance>| is_of(it, pool) && it.tenant.as_deref() == tenant;
        let at = idle.iter().rposition(serves)?;
        Some(idle.remove(at))
    }

    /// A process waits from now on. If more than `most` are tenants' own then, the one of them that has
    /// waited longest is taken out: nothing else would end it, for other tenants' work it cannot get.
    pub(super) fn put(&self, instance: Arc<Instance>, most: usize) -> Option<Arc<Instance>> {
        let mut idle = lock(&self.0);
        idle.push(instance);
        let tenants = idle.iter().filter(|it| it.tenant.is_some()).count();
        let oldest = idle.iter().position(|it| it.tenant.is_some()).filter(|_| tenants > most)?;
        Some(idle.remove(oldest))
    }

    /// A process gets no more work.
    pub(super) fn remove(&self, instance: &Arc<Instance>) {
        lock(&self.0).retain(|other| !Arc::ptr_eq(other, instance));
    }

    /// No process of this function gets more work.
    pub(super) fn remove_all_of(&self, pool: &Pool) {
        lock(&self.0).retain(|it| !is_of(it, pool));
    }

    /// Takes out those that have waited for as long as `limit`.
    pub(super) fn take_older(&self, limit: Duration) -> Vec<Arc<Instance>> {
        let mut idle = lock(&self.0);
        let (old, rest) = idle.drain(..).partition(|it| it.idle_for() >= limit);
        *idle = rest;
        old
    }
}

#[cfg(test)]
impl Idle {
    pub(super) fn len(&self) -> usize {
        lock(&self.0).len()
    }
}

fn is_of(instance: &Instance, pool: &Pool) -> bool {
    std::ptr::eq(Arc::as_ptr(&instance.pool), pool)
}
