"""Roles that stand on another's frozen base: what they take over from its block of the recipe. No torch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genac_megatron.recipe.schema import Recipe, RoleConfig

OWN = ("share", "head", "checkpoint", "peft")  # of a model's block that shares a base: its alone


def inherited(recipe: Any) -> Any:
    """A recipe's plain data in which such a role has the other's model, and its layout where it has none.

    Resolved again they are the same. What is no recipe's data is given back as it is.
    """
    if not isinstance(recipe, dict) or not isinstance(recipe.get("roles"), dict):
        return recipe
    roles = dict(recipe["roles"])
    for name, role in roles.items():
        model = role.get("model") if isinstance(role, dict) else None
        other = _shared(roles, model)
        if not isinstance(other, dict) or not isinstance(model, dict) or other is role:
            continue
        theirs = other.get("model")
        shared = (
            {key: value for key, value in theirs.items() if key not in OWN}
            if isinstance(theirs, dict)
            else {}
        )
        made = {**role, "model": {**copy.deepcopy(shared), **model}}
        if "layout" in other:
            made.setdefault("layout", copy.deepcopy(other["layout"]))
        roles[name] = made
    return {**recipe, "roles": roles}


def lent(recipe: Any) -> Any:
    """A recipe's plain data in which a role that shares another's servers has its engine too.

    Resolved again they are the same. What is no recipe's data is given back as it is.
    """
    if not isinstance(recipe, dict) or not isinstance(recipe.get("roles"), dict):
        return recipe
    roles = dict(recipe["roles"])
    for name, role in recipe["roles"].items():
        engine = role.get("engine") if isinstance(role, dict) else None
        other = _shared(roles, engine)
        theirs = other.get("engine") if isinstance(other, dict) else None
        if isinstance(engine, dict) and isinstance(theirs, dict):
            roles[name] = {**role, "engine": {**copy.deepcopy(theirs), **engine}}
    return {**recipe, "roles": roles}


def _shared(roles: dict[str, Any], block: Any) -> Any:
    """The plain data of the role that a block shares with; None where it names none."""
    name = block.get("share") if isinstance(block, dict) else None
    return roles.get(name) if isinstance(name, str) else None


def only(recipe: Recipe, roles: Mapping[str, RoleConfig]) -> Recipe:
    """The recipe with these roles alone. One whose servers would be an absent role's has some of its own."""
    made = {
        name: role
        if role.engine.share in roles
        else role.model_copy(update={"engine": role.engine.model_copy(update={"share": None})})
        for name, role in roles.items()
    }
    return recipe.model_copy(update={"roles": made})


def owner_of(recipe: Recipe, name: str) -> str | None:
    """The role whose base a role stands on; None: it has one of its own, as by itself in an evaluation."""
    share = recipe.roles[name].model.share
    return share if share in recipe.roles else None


def in_order(recipe: Recipe) -> list[str]:
    """The roles, those with a base of their own first: they are built in this order."""
    return sorted(recipe.roles, key=lambda name: owner_of(recipe, name) is not None)
