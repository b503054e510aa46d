"""Where every number of a model stands on disk. Imports no torch.

A key of a checkpoint (train/checkpoint/writer.py: a parameter, or one global expert of a stack, or
a buffer) is made of parts: tensors on disk, or rows of stacked ones, put together along the first
axis, at most in another order. No key needs arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from model.families.family import Family
from model.families.reading import Reading, Settings, moe_layers

Shape = tuple[int, ...]
BIAS = "balance_bias"


@dataclass(frozen=True)
class Part:
    """A run of first rows of one of our tensors, and the tensor on disk that holds it."""

    name: str
    """On disk."""
    shape: Shape
    """Of the part."""
    index: int | None = None
    """Which entry of a tensor on disk that stacks all experts; None: the whole tensor."""
    order: tuple[int, ...] | None = None
    """Row i of the part is row order[i] on disk; None: they stand in the same order."""
    is_transposed: bool = False
    """Whether rows of the part are columns on disk."""

    @property
    def shape_there(self) -> Shape:
        """Of the tensor on disk, or of one entry of a stacked one."""
        return self.shape[::-1] if self.is_transposed else self.shape


Parts = dict[str, tuple[Part, ...]]


def parts_of(reading: Reading) -> Parts:
    """Key of a checkpoint -> its parts, in the order of the layers. Buffers are "buffer/<name>"."""
    model = reading.model
    hidden = model["hidden_size"]
    found: Parts = {
        "embedding.weight": (Part("model.embed_tokens.weight", (model["vocab_size"], hidden)),)
    }
    with_experts = set(moe_layers(model))
    for layer in range(model["num_layers"]):
        names = f"blocks.{layer}", f"model.layers.{layer}"
        found |= _layer(*names, reading, layer in with_experts)
    found["norm.weight"] = (Part("model.norm.weight", (hidden,)),)
    if not model["tie_embeddings"]:
        found["head.weight"] = (Part("lm_head.weight", (model["vocab_size"], hidden)),)
    return found


def further_parts(reading: Reading, number: int) -> Parts:
    """Those of module `number`, from 0, of multi-token prediction, which stands on disk as a layer
    after the last one (DeepSeek-V3, GLM-4.5). Copies of embedding and head beside it are not read:
    modules share the model's own.
    """
    hidden = reading.model["hidden_size"]
    ours, theirs = f"mtp.{number}", f"model.layers.{reading.model['num_layers'] + number}"
    return _layer(f"{ours}.block", theirs, reading, bool(reading.model["num_experts"])) | {
        f"{ours}.embedding_norm.weight": (Part(f"{theirs}.enorm.weight", (hidden,)),),
        f"{ours}.hidden_norm.weight": (Part(f"{theirs}.hnorm.weight", (hidden,)),),
        f"{ours}.projection.weight": (Part(f"{theirs}.eh_proj.weight", (hidden, 2 * hidden)),),
        f"{ours}.norm.weight": (Part(f"{theirs}.shared_head.norm.weight", (hidden,)),),
    }


def further_copies(reading: Reading, number: int) -> dict[str, str]:
    """Tensors beside module `number` that its family's files have again for it -> those of the
    model.
    """
    layer = f"model.layers.{reading.model['num_layers'] + number}"
    embedding = "model.embed_tokens.weight"
    head = embedding if reading.model["tie_embeddings"] else "lm_head.weight"
    return {f"{layer}.embed_tokens.weight": embedding, f"{layer}.shared_head.head.weight": head}


def _layer(ours: str, theirs: str, reading: Reading, has_experts: bool) -> Parts:
    model, family = reading.model, reading.family
    hidden = model["hidden_size"]
    found = _norms(ours, theirs, hidden)
    if reading.attention.get("sinks"):
        sinks = Part(f"{theirs}.self_attn.sinks", (model["num_heads"],))
        found[f"{ours}.attention.sinks"] = (sinks,)
    if reading.attention["name"] == "mla":
        found |= _latent(ours, theirs, reading)
    else:
        found |= _attention(ours, theirs, model)
    if has_experts:
        return found | _experts(f"{ours}.mlp", f"{theirs}.{family.mlp}", model, family)
    return found | _swiglu(f"{ours}.mlp", f"{theirs}.mlp", hidden, model["intermediate_size"])


def _norms(ours: str, theirs: str, hidden: int) -> Parts:
    return {
        f"{ours}.attention_norm.weight": (Part(f"{theirs}.input_layernorm.weight", (hidden,)),),
        f"{ours}.mlp_norm.weight": (Part(f"{theirs}.post_attention_layernorm.weight", (hidden,)),),
    }


def _latent(ours: str, theirs: str, reading: Reading) -> Parts:
    """Latent attention. Most files interleave the pairs of dimensions that are turned; ours
    are half-split, so the rows of what is turned stand in another order, and nothing else changes:
    a rotation of pairs and the products of queries with keys do not ask where a pair stands.
    """
    model, attention = reading.model, reading.attention
    hidden, heads = model["hidden_size"], model["num_heads"]
    nope, rope = attention["qk_nope_head_dim"], attention["qk_rope_head_dim"]
    latent, values = attention["kv_lora_rank"], attention["v_head_dim"]
    pairs = [*range(0, rope, 2), *range(1, rope, 2)]
    head = [*range(nope), *(nope + row for row in pairs)]
    of_queries: tuple[int, ...] | None = None
    of_latent: tuple[int, ...] | None = None
    if reading.is_interleaved:
        of_queries = tuple(first * len(head) + row for first in range(heads) for row in head)
        of_latent = (*range(latent), *(latent + row for row in pairs))

    found: Parts = {}

    def add(name: str, there: str, shape: Shape, order: tuple[int, ...] | None = None) -> None:
        part = Part(f"{theirs}.self_attn.{there}.weight", shape, order=order)
        found[f"{ours}.attention.{name}.weight"] = (part,)

    queries, rank = heads * (nope + rope), attention["q_lora_rank"]
    if rank is None:
        add("q_proj", "q_proj", (queries, hidden), of_queries)
    else:
        add("q_a_proj", "q_a_proj", (rank, hidden))
        add("q_a_norm", "q_a_layernorm", (rank,))
        add("q_b_proj", "q_b_proj", (queries, rank), of_queries)
    add("kv_a_proj", "kv_a_proj_with_mqa", (latent + rope, hidden), of_latent)
    add("kv_a_norm", "kv_a_layernorm", (latent,))
    add("kv_b_proj", "kv_b_proj", (heads * (nope + values), latent))
    add("o_proj", "o_proj", (hidden, heads * values))
    return found


def _attention(ours: str, theirs: str, model: Settings) -> Parts:
    hidden, head = model["hidden_size"], model["head_dim"]
    queries, keys = model["num_heads"] * head, model["num_kv_heads"] * head
    found: Parts = {}
    for letter, rows in (("q", queries), ("k", keys), ("v", keys)):
        name = f"{letter}_proj"
        shapes: dict[str, Shape] = {"weight": (rows, hidden)}
        if model["attention_bias"] != "none":
            shapes["bias"] = (rows,)
        found |= {
            f"{ours}.attention.{name}.{kind}": (Part(f"{theirs}.self_attn.{name}.{kind}", shape),)
            for kind, shape in shapes.items()
        }
    shapes = {"weight": (hidden, queries)}
    if model["attention_bias"] == "qkvo":
        shapes["bias"] = (hidden,)
    found |= {
        f"{ours}.attention.o_proj.{kind}": (Part(f"{theirs}.self_attn.o_proj.{kind}", shape),)
        for kind, shape in shapes.items()
    }
    if model["qk_norm"] != "none":
        sizes = (head, head) if model["qk_norm"] == "head" else (queries, keys)
        for letter, size in zip("qk", sizes, strict=True):
            name = f"{letter}_norm.weight"
            found[f"{ours}.attention.{name}"] = (Part(f"{theirs}.self_attn.{name}", (size,)),)
    return found


def _experts(ours: str, theirs: str, model: Settings, family: Family) -> Parts:
    hidden, width = model["hidden_size"], model["expert_intermediate_size"]
    num_experts = model["num_experts"]
    found: Parts = {
        f"{ours}.router.weight": (Part(f"{theirs}.{family.gate}", (num_experts, hidden)),)
    }
    if family.is_transposed:
        own = Part(f"{theirs}.{family.gate.replace('weight', 'bias')}", (num_experts,))
        found[f"{ours}.router.bias"] = (own,)
    if family.selection_bias is not None:
        bias = Part(f"{theirs}.{family.selection_bias}", (num_experts,))
        found[f"buffer/{ours}.router.{BIAS}"] = (bias,)

    for expert in range(num_experts):
        gate_up, down = f"{ours}.experts.gate_up.{expert}", f"{ours}.experts.down.{expert}"
        if family.is_transposed:
            found |= _transposed(f"{ours}.experts", theirs, model, family, expert)
        elif family.stacked is not None:
            into, back = (f"{theirs}.{name}" for name in family.stacked)
            found[gate_up] = (Part(into, (2 * width, hidden), expert),)
            found[down] = (Part(back, (hidden, width), expert),)
        else:
            first, second, back = (f"{theirs}.{name.format(e=expert)}" for name in family.experts)
            found[gate_up] = (Part(first, (width, hidden)), Part(second, (width, hidden)))
            found[down] = (Part(back, (hidden, width)),)

    if model["num_shared_experts"]:
        shared = f"{theirs}.{family.shared}"
        found |= _swiglu(f"{ours}.shared", shared, hidden, model["num_shared_experts"] * width)
        if model["shared_expert_gate"]:
            own = Part(f"{theirs}.{family.shared_gate}", (1, hidden))
            found[f"{ours}.shared_gate.weight"] = (own,)
    return found


def _transposed(ours: str, theirs: str, model: Settings, family: Family, expert: int) -> Parts:
    """One expert of stacks whose rows are columns of ours, gate and up taking turns, and the biases
    beside them.
    """
    assert family.stacked is not None
    hidden, width = model["hidden_size"], model["expert_intermediate_size"]
    into, back = (f"{theirs}.{name}" for name in family.stacked)
    turns = (*range(0, 2 * width, 2), *range(1, 2 * width, 2))
    return {
        f"{ours}.gate_up.{expert}": (Part(into, (2 * width, hidden), expert, turns, True),),
        f"{ours}.gate_up_bias.{expert}": (Part(f"{into}_bias", (2 * width,), expert, turns),),
        f"{ours}.down.{expert}": (Part(back, (hidden, width), expert, is_transposed=True),),
        f"{ours}.down_bias.{expert}": (Part(f"{back}_bias", (hidden,), expert),),
    }


def _swiglu(ours: str, theirs: str, hidden: int, width: int) -> Parts:
    return {
        f"{ours}.gate_up.weight": (
            Part(f"{theirs}.gate_proj.weight", (width, hidden)),
            Part(f"{theirs}.up_proj.weight", (width, hidden)),
        ),
        f"{ours}.down.weight": (Part(f"{theirs}.down_proj.weight", (hidden, width)),),
    }


def on_disk(parts: Parts) -> dict[str, Shape]:
    """Every tensor that files of these parts hold -> its shape; stacked ones with their first
    axis.
    """
    shapes: dict[str, Shape] = {}
    for part in (part for several in parts.values() for part in several):
        if part.index is None:
            shapes[part.name] = part.shape_there
        else:
            rows = max(part.index + 1, shapes.get(part.name, (0,))[0])
            shapes[part.name] = (rows, *part.shape_there)
    return shapes


@dataclass(frozen=True)
class Place:
    """Where a tensor on disk, or an entry of a stacked one, stands in ours."""

    key: str
    first_row: int
    num_rows: int
    order: tuple[int, ...] | None = None
    """As Part.order: row order[i] on disk is row i of the place."""
    is_transposed: bool = False
    """As Part.is_transposed."""


def places(parts: Parts) -> dict[str, list[Place]]:
    """Tensor on disk -> its places: one, or one for each entry of a stacked tensor, in order."""
    found: dict[str, list[Place]] = {}
    for name, _, place in sorted(_places(parts), key=lambda entry: entry[1]):
        found.setdefault(name, []).append(place)
    return found


def _places(parts: Parts) -> Iterator[tuple[str, int, Place]]:
    for key, several in parts.items():
        row = 0
        for part in several:
            place = Place(key, row, part.shape[0], part.order, part.is_transposed)
            yield part.name, part.index or 0, place
            row += part.shape[0]


def differences(there: Mapping[str, Shape], reading: Reading, parts: Parts) -> list[str]:
    """Where the tensors of a folder are not those that its config.json means, in sentences."""
    wanted = on_disk(parts)
    found = [f"{name} of shape {list(wanted[name])} is missing" for name in wanted.keys() - there]
    found += [
        f"{name} has shape {list(there[name])}, where config.json means {list(shape)}"
        for name, shape in wanted.items()
        if name in there and tuple(there[name]) != shape
    ]
    found += [
        f"{name} is no part of what config.json describes"
        for name in there
        if name not in wanted and not _may_be_left(name, reading)
    ]
    return sorted(found)


def _may_be_left(name: str, reading: Reading) -> bool:
    """Tensors that have no say: tables that are computed, a head that is tied (compared when it is
    read), layers that predict further tokens.
    """
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if name.endswith(reading.fp8_scales) and reading.fp8_block is not None:
        return True
    if name == "lm_head.weight":
        return bool(reading.model["tie_embeddings"])
    layer = name.removeprefix("model.layers.").partition(".")[0]
    return (
        layer.isdigit()
        and int(layer) >= reading.model["num_layers"]
        and bool(reading.num_further_layers)
    )
