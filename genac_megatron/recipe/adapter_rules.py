"""Rules of a role that is trained as adapters: what they cannot go beside, and where it begins. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from genac_megatron.errors import InputError
from genac_megatron.models.families.base import Shape
from genac_megatron.models.peft_folder import PeftHeaders
from genac_megatron.recipe import pipeline
from genac_megatron.recipe.precision import Where
from genac_megatron.recipe.schema import AdapterConfig, ModelConfig, Recipe, RoleConfig
from genac_megatron.recipe.sharing import OWN
from genac_megatron.recipe.training import TARGETS

# What is of the one base, or of where its parts lie. offload: it leaves the device with all that stand on it.
OF_LAYOUT = ("first_rank", "tp", "pp", "vpp", "cp", "ep", pipeline.KEY)
OF_TRAINING = (
    *("dtype", "specs", "fp8", "fp8_param", "fp8_amax_history", "bf16_first_layers", "bf16_last_layers"),
    "offload",
)


def check_adapter(name: str, role: RoleConfig, shape: Shape, where: Where) -> None:
    """Raise InputError where a role's adapter cannot be, or a key beside it says nothing."""
    training, adapter = role.training, role.training.adapter
    for key, instead in (("base", "call it checkpoint"), ("peft", "take it out")):
        if adapter is None and getattr(role.model, key) is not None:
            what = "a base, which is an adapter's" if key == "base" else "an adapter's folder to begin with"
            raise InputError(
                f"'{name}' names {what}",
                where=where(("roles", name, "model", key)),
                way_out=f"{instead}, or give the role a training.adapter",
            )
    if role.model.base is None and role.model.base_role is not None:
        raise InputError(
            f"'{name}' has a base_role and no base in which it is one",
            where=where(("roles", name, "model", "base_role")),
            way_out="name a checkpoint or run in base, or take base_role out",
        )
    if adapter is None:
        return
    place = ("roles", name, "training")

    def refuse(key: str, what: str, way_out: str, *within: str) -> InputError:
        return InputError(f"'{name}' {what}", where=where((*place, key, *within)), way_out=way_out)

    if shape.experts is not None:
        raise refuse(
            "adapter",
            f"is a mixture of {shape.experts} experts ({shape.family}), whose layers have no adapters here",
            "take adapter out, or use a dense model",
        )
    if role.layout.tp > shape.kv_heads:
        raise InputError(
            f"'{name}' has an adapter, and tp {role.layout.tp} for {shape.kv_heads} heads of keys: ranks "
            "that share one hold no whole projection of it",
            where=where(("roles", name, "layout", "tp")),
            way_out=f"lower tp to {shape.kv_heads}, or take the adapter out",
        )
    if training.frozen:
        raise refuse("frozen", "is frozen and has an adapter to train", "take one of them out")
    if training.frozen_attention:
        raise refuse(
            "frozen_attention",
            "has an adapter, beside which the whole model is frozen, attention too",
            "take frozen_attention out; targets says which projections have an adapter",
        )
    twice = [target for target, times in Counter(adapter.targets).items() if times > 1]
    if twice:
        raise refuse("adapter", f"names {twice[0]} twice", "name each projection once", "targets")
    if role.model.peft is not None:
        _check_peft(name, role.model, adapter, shape, where)


def _check_peft(name: str, model: ModelConfig, adapter: AdapterConfig, shape: Shape, where: Where) -> None:
    """The folder holds an adapter of this model, the very one that the role trains on."""
    place = ("roles", name, "model", "peft")
    if model.checkpoint is not None:
        raise InputError(
            f"'{name}' has a checkpoint and a PEFT folder to begin with",
            where=where(place),
            way_out="take one of them out",
        )
    folder = PeftHeaders(model.peft or "")
    found = folder.adapter()
    same = (found.rank, found.alpha, set(found.targets)) == (adapter.rank, adapter.alpha, {*adapter.targets})
    if not same:
        targets = "" if len(found.targets) == len(TARGETS) else f", targets: [{', '.join(found.targets)}]"
        raise InputError(
            f"'{name}' trains another adapter than the one in {model.peft}",
            where=where(("roles", name, "training", "adapter")),
            way_out=f"set adapter: {{rank: {found.rank}, alpha: {found.alpha:g}{targets}}}",
        )
    folder.check(shape)


def check_share(recipe: Recipe, name: str, where: Where) -> None:
    """Raise InputError where a role cannot stand on the base of the one that it names."""
    role, place = recipe.roles[name], ("roles", name)
    share = role.model.share
    if share is None:
        return

    def refuse(key: Sequence[str], what: str, way_out: str) -> InputError:
        return InputError(f"'{name}' {what}", where=where((*place, *key)), way_out=way_out)

    other = recipe.roles.get(share)
    at = ("model", "share")
    if other is None or share == name:
        others = ", ".join(known for known in recipe.roles if known != name)
        raise refuse(at, f"is to share the base of '{share}'", f"name another role: {others}")
    if other.model.share is not None:
        what = f"is to share the base of '{share}', which stands on that of '{other.model.share}' itself"
        raise refuse(at, what, f"share: {other.model.share}")
    for known, config in ((name, role), (share, other)):
        if config.training.adapter is None:
            raise refuse(
                at,
                f"is to share the base of '{share}', and '{known}' trains it whole",
                f"give roles.{known}.training an adapter, or roles.{name} a model of its own",
            )
    mine, theirs = role.model.model_dump(exclude={*OWN}), other.model.model_dump(exclude={*OWN})
    for key in (key for key in mine if mine[key] != theirs[key]):
        what = f"shares the base of '{share}' and has another model.{key}: {mine[key]} ({theirs[key]})"
        raise refuse(("model", key), what, f"take {key} out of roles.{name}.model")
    world = recipe.world.ranks
    counts = [config.layout.count or world - config.layout.first_rank for config in (role, other)]
    for block, keys in (("layout", OF_LAYOUT), ("training", OF_TRAINING)):
        for key in keys:
            was, is_ = (getattr(getattr(config, block), key) for config in (role, other))
            if was != is_:
                what = f"shares the base of '{share}' and has another {block}.{key}: {was} ({is_})"
                raise refuse((block, key), what, f"set roles.{name}.{block}.{key}: {is_}")
    if counts[0] != counts[1]:
        what = f"shares the base of '{share}', on {counts[0]} ranks ({counts[1]})"
        raise refuse(("layout", "count"), what, f"give both the same ranks: leave roles.{name}.layout out")


def check_moving(recipe: Recipe, name: str, where: Where) -> None:
    """Raise InputError where a role's adapter cannot be merged into its base while it trains."""
    role = recipe.roles[name]
    adapter = role.training.adapter
    if adapter is None or adapter.merge_every is None:
        return
    key = ("roles", name, "training", "adapter", "merge_every")

    def refuse(what: str, way_out: str) -> InputError:
        text = f"'{name}' is to be merged into its base every {adapter.merge_every} steps, {what}"
        return InputError(text, where=where(key), way_out=way_out)

    owner = role.model.share
    if owner is not None:
        raise refuse(
            f"and that is the base of '{owner}', which alone may move it",
            f"take merge_every out, and set roles.{owner}.training.adapter.merge_every",
        )
    if role.training.fp8_param:
        raise refuse("and that is kept in FP8, whose rounding it does not survive", "set fp8_param: false")
    for other, config in recipe.roles.items():
        lender = config.engine.share
        apart = config.model.share != name and other != name
        if (lender == name and apart) or (other == name and lender is not None):
            beside = other if lender == name else lender
            raise refuse(
                f"and '{beside}' is on the same servers with a base of its own",
                f"set roles.{beside}.model={{share: {name}}}, or take engine.share out",
            )
    for stage in recipe.stages:
        if any(actor.checkpoint is not None for actor in getattr(stage, "actors", ())) and name == "actor":
            raise refuse(
                f"and the stage '{stage.name}' plays actors of other checkpoints, beside bases of their own",
                f"take checkpoints out of stages.{stage.name}.actors, or merge_every out",
            )


def check_begins(name: str, role: RoleConfig, who: str, place: Sequence[str | int], where: Where) -> None:
    """A role that takes another's weights has none that stand still. Raises InputError for an adapter's."""
    if role.training.adapter is not None:
        raise InputError(
            f"{who} has '{name}' start from another role's weights, and '{name}' is an adapter: a resumed "
            "run finds its base by the recipe alone",
            where=where(place),
            way_out=f"take start_from out, and name the weights in roles.{name}.model (hf or base)",
        )
