"""What schemathesis needs to know to run .ci/check-contract: who asks, and what it must leave alone."""

import base64
import json
import os

import schemathesis
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from requests.auth import AuthBase

GIVEN = json.loads(base64.b64decode(os.environ["CONTRACT"]))
# The tenant whose key asks, and the key: without them every later answer would be a 401.
OWN = {"contract", GIVEN["key"].split("_")[3]}


class Tenant(AuthBase):
    def __call__(self, request):
        request.headers["Authorization"] = f"Bearer {GIVEN['key']}"
        return request


class Operator(AuthBase):
    """Signs what is sent, as it is sent."""

    def __call__(self, request):
        admin = GIVEN["admin"]
        key = Credentials(admin["access_key_id"], admin["secret_access_key"])
        signed = AWSRequest(method=request.method, url=request.url, data=request.body)
        SigV4Auth(key, "execute-api", admin["region"]).add_auth(signed)
        request.headers.update(dict(signed.headers))
        return request


schemathesis.auth.set_from_requests(Tenant()).apply_to(path_regex="^/v1/")
schemathesis.auth.set_from_requests(Operator()).apply_to(path_regex="^/admin/")


def sendable(header):
    """Whether this client can send a header's value: it has no bytes for most of Unicode."""
    try:
        return str(header).encode("latin-1") is not None
    except UnicodeEncodeError:
        return False


@schemathesis.hook
def filter_case(context, case):
    """Leaves the asking tenant and its key as they are, and out what cannot be sent."""
    others = OWN.isdisjoint(map(str, (case.path_parameters or {}).values()))
    return others and all(map(sendable, (case.headers or {}).values()))
