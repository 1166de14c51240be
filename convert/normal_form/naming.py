"""Every node gets the name people know it by, in `meta["layer"]`, unique in the graph."""

from torch.fx import GraphModule, Node

from calibrate.graph import is_constant, kind, operator_name

# Modules whose one operator is the layer; a container's name alone would not say which operator is meant.
LEAVES = "torch.nn.modules."
CONTAINERS = ("torch.nn.modules.container.", "torch.nn.modules.module.Module")


def layers_are_named(graph: GraphModule) -> None:
    """Weighted layers first, by the path of their weight ("blocks.0.qkv"); the others by module and operator."""
    nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
    busy = _operators_per_module(nodes)
    taken: set[str] = set()
    weighted = [n for n in nodes if _weight_path(n) is not None]
    for node in [*weighted, *(n for n in nodes if n not in set(weighted))]:
        name = _given(node) or _weight_path(node) or _module_path(node, busy)
        node.meta["layer"] = _unique(name, taken)
        node.meta.pop("custom", None)


def _given(node: Node) -> str | None:
    """The name an importer gave; for a pattern of several nodes their common scope and what they spell."""
    name = node.meta.get("custom", {}).get("layer")
    if name and "/" in name and "spelled" in node.meta:
        return f"{name.rpartition('/')[0]}/{node.meta['spelled']}"
    return name


def _unique(name: str, taken: set[str]) -> str:
    unique, count = name, 0
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    taken.add(unique)
    return unique


def _weight_path(node: Node) -> str | None:
    """The name of the layer's weight without ".weight"; None for an operator without a weight."""
    if kind(node) not in ("conv", "conv_transpose", "linear", "embedding", "batch_norm", "layer_norm", "group_norm"):
        return None
    position = {"embedding": 0, "layer_norm": 2, "group_norm": 2}.get(kind(node), 1)
    weight = node.args[position] if len(node.args) > position else None
    if not isinstance(weight, Node) or not is_constant(weight) or "fqn" not in weight.meta:
        return None
    path = str(weight.meta["fqn"])
    for suffix in (".weight", "_weight", ".weight_v", ".weight_orig"):
        if path.endswith(suffix) and path != suffix:
            return path.removesuffix(suffix)
    return path


def _stack(node: Node) -> tuple[str, str]:
    """(path, class) of the innermost module that ran the node."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1] if stack else ("", "")


def _operators_per_module(nodes: list[Node]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in nodes:
        if kind(node) not in ("shape", "getitem"):
            path = _stack(node)[0]
            counts[path] = counts.get(path, 0) + 1
    return counts


def _module_path(node: Node, busy: dict[str, int]) -> str:
    path, module = _stack(node)
    leaf = module.startswith(LEAVES) and not module.startswith(CONTAINERS)
    if path and leaf and busy.get(path) == 1:
        return path
    operation = operator_name(node) or node.name
    return f"{path}.{operation}" if path else operation
