"""Rules of a role's servers: how they are dealt over nodes and GPUs. No torch."""

from __future__ import annotations

from genac_megatron.errors import InputError
from genac_megatron.recipe.precision import Where
from genac_megatron.recipe.schema import EngineConfig, PublicationConfig, RoleConfig

# What an embedded engine reads too; enable_lora and share have a rule of their own (recipe/lora_rules.py)
EMBEDDED = {
    "engine": {"kind", "dtype", "quantization", "max_batch", "max_batch_tokens", "routing_replay"}
    | {"enable_lora", "share"},
    "publication": {"every"},
}


def check_servers(name: str, role: RoleConfig, where: Where) -> None:
    """Raise InputError where servers cannot be dealt evenly to nodes, or to the GPUs that are named."""
    engine, place = role.engine, ("roles", name, "engine")
    if engine.kind != "sglang":
        return

    def refuse(key: str, what: str, way_out: str) -> InputError:
        return InputError(what, where=where((*place, key)), way_out=way_out)

    nodes, blocks = engine.nodes, len(engine.nodes) // engine.nnodes
    if engine.nnodes > 1:
        _check_spans(name, role, where)
    if len(set(nodes)) < len(nodes) or len(nodes) % engine.nnodes or engine.engines % blocks:
        each = f", {engine.nnodes} nodes each" if engine.nnodes > 1 else ""
        raise refuse(
            "nodes",
            f"{engine.engines} servers of '{name}' over nodes {nodes}{each}",
            "name each node once, and make engines a multiple of their number"
            + (" / nnodes, which is to come out even" if engine.nnodes > 1 else ""),
        )
    if len(nodes) > 1 and engine.host != EngineConfig().host:
        raise refuse(
            "host",
            f"the servers of '{name}' are on {len(nodes)} nodes, and one address is named for all",
            "leave host out: each node takes its address on the fabric",
        )
    if engine.urls and nodes != [0]:
        raise refuse(
            "nodes",
            f"somebody else runs the servers of '{name}' (urls), so nodes says nothing",
            "take nodes out",
        )
    needed = engine.engines_per_node * engine.tp_per_node
    if engine.gpus and len(engine.gpus) != needed:
        raise refuse(
            "gpus",
            f"'{name}' names {len(engine.gpus)} GPUs, its {engine.engines_per_node} servers of a node take "
            f"{needed}",
            "name engines / len(nodes) * tp of them",
        )
    if len(set(engine.gpus)) < len(engine.gpus):
        raise refuse(
            "gpus",
            f"'{name}' names a GPU twice for its servers of a node: {engine.gpus}",
            "name different ones, tp for each server in order; other roles may share them",
        )


def _check_spans(name: str, role: RoleConfig, where: Where) -> None:
    """Servers over several nodes: SGLang's own --nnodes."""
    engine, place = role.engine, ("roles", name, "engine")

    def refuse(key: str, what: str, way_out: str) -> InputError:
        told = f"a server of '{name}' spans {engine.nnodes} nodes{what}"
        return InputError(told, where=where((*place, key)), way_out=way_out)

    if engine.urls:
        raise refuse("nnodes", ", and somebody else runs it (urls)", "take nnodes out")
    if engine.tp % engine.nnodes:
        raise refuse("nnodes", f", which do not divide tp {engine.tp}", "make tp a multiple of nnodes")
    if len(engine.nodes) < engine.nnodes:
        raise refuse("nodes", f", and nodes names {engine.nodes}", "name as many nodes as all servers take")
    if engine.enable_lora:
        raise refuse(
            "enable_lora",
            ", and adapters are handed to servers of one node",
            "take enable_lora or nnodes out",
        )
    if role.publication.transport == "tensor":
        raise InputError(
            f"a server of '{name}' spans {engine.nnodes} nodes, and memory is shared on one",
            where=where(("roles", name, "publication", "transport")),
            way_out="leave transport out (it is group then), or set disk",
        )


# What servers that are started here are told; those of `urls` are somebody else's
STARTED = ("engines", "gpus", "mem_fraction", "host", "port", "python", "args")


def check_unread(name: str, role: RoleConfig, where: Where) -> None:
    """Raise InputError where something is written of servers that nothing would read."""
    engine, publication = role.engine, role.publication
    if engine.kind != "sglang":
        return

    def refuse(block: str, key: str, why: str, way_out: str) -> None:
        raise InputError(
            f"'{name}' sets {block}.{key}, {why}", where=where(("roles", name, block, key)), way_out=way_out
        )

    usual = EngineConfig()
    if engine.urls:
        for key in STARTED:
            if getattr(engine, key) != getattr(usual, key):
                refuse("engine", key, "and its servers (engine.urls) are not started here",
                       f"take {key} out, or urls")  # fmt: skip
    elif engine.api_key_env is not None:
        refuse("engine", "api_key_env", "which is of servers that are named (engine.urls)",
               "take it out: servers that are started here have keys of their own")  # fmt: skip
    if publication.pause != "retract" and publication.mode == "drain":
        refuse("publication", "pause", "and its publications wait for running requests (mode: drain)",
               "set publication.mode: in_flight, or take pause out")  # fmt: skip
    if publication.folder is not None and publication.transport != "disk":
        refuse("publication", "folder", f"and its weights do not go by disk ({publication.transport})",
               "set publication.transport: disk, or take folder out")  # fmt: skip
    if publication.address is not None and publication.transport in ("tensor", "disk"):
        refuse("publication", "address", f"and its weights go by {publication.transport}",
               "set publication.transport: group, or take address out")  # fmt: skip


def check_embedded(name: str, role: RoleConfig, where: Where) -> None:
    """Raise InputError where something is written that an embedded engine would not read."""
    if role.engine.kind != "embedded":
        return
    written = {
        "engine": (role.engine, EngineConfig()),
        "publication": (role.publication, PublicationConfig()),
    }
    for block, (mine, usual) in written.items():
        others = mine.model_fields_set - EMBEDDED[block]
        for key in sorted(key for key in others if getattr(mine, key) != getattr(usual, key)):
            raise InputError(
                f"'{name}' sets {block}.{key}, which is of SGLang's servers, and its engine is embedded",
                where=where(("roles", name, block, key)),
                way_out=f"set roles.{name}.engine.kind: sglang, or take {key} out (an override "
                f"roles.{name}.{block}={{}} writes the block anew)",
            )
