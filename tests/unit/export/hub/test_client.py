"""Whether a token may push, from what the Hub says of it: known before anything is uploaded."""

from __future__ import annotations

from typing import Any

import pytest

from cloze.export.hub.client import Target, missing_right

TARGET, PR = Target("x"), Target("x", create_pr=True)


def who(role: str | None, scoped: Any = (), held: Any = (), orgs: Any = ()) -> dict[str, Any]:
    token = None if role is None else {"role": role}
    if role == "fineGrained":
        entries = [{"entity": {"type": "user", "name": name}, "permissions": list(what)} for name, what in scoped]
        token |= {"fineGrained": {"global": list(held), "scoped": entries}}
    listed = [{"name": name, "roleInOrg": role_in} for name, role_in in orgs]
    return {"name": "me", "orgs": listed, "auth": {"accessToken": token} if token else {"type": "oauth"}}


@pytest.mark.parametrize(
    ("answer", "repo", "target", "missing"),
    [
        (who("write"), "me/x", TARGET, None),
        (who("write", orgs=[("team", "contributor")]), "team/x", TARGET, None),
        (who("write", orgs=[("team", "read")]), "team/x", TARGET, "role `write`"),
        (who("write"), "other/x", TARGET, "other is neither me nor an organization"),
        (who("write"), "other/x", PR, None),
        (who("read"), "me/x", TARGET, "scope `write`"),
        (who("read"), "me/x", PR, "scope `write`"),
        (who(None), "other/x", TARGET, None),
        (who("fineGrained", [("me", ["repo.write"])]), "me/x", TARGET, None),
        (who("fineGrained", [("me/x", ["repo.write"])]), "me/x", TARGET, None),
        (who("fineGrained", [("me/y", ["repo.write"])]), "me/x", TARGET, "scope `repo.write` for me"),
        (who("fineGrained", [("me", ["repo.content.read"])]), "me/x", TARGET, "scope `repo.write` for me"),
        (who("fineGrained", [("me", ["repo.write"])]), "team/x", TARGET, "scope `repo.write` for team"),
        (who("fineGrained", [("me", ["repo.content.read"])]), "me/x", PR, "scope `discussion.write` for me"),
        (who("fineGrained", held=["discussion.write"]), "other/x", PR, None),
        (who("fineGrained", held=["discussion.write"]), "other/x", TARGET, "scope `repo.write` for other"),
    ],
)
def test_the_missing_right_is_named(answer: dict[str, Any], repo: str, target: Target, missing: str | None):
    found = missing_right(answer, repo, target)
    assert found is None if missing is None else missing in found
