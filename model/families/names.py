"""Where every number of a model stands on disk. Imports no torch.

A key of a checkpoint (train/checkpoint/writer.py: a parameter, or one global expert of a stack, or
a buffer) is made of parts: tensors on disk, or rows of stacked ones, put together along the first
axis, at most in another order. No key needs arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from model.cost.entries import compressed_kinds
from model.families.family import NUMBERED, Family
from model.families.reading import Reading, Settings, moe_layers

Shape = tuple[int, ...]
BIAS = "balance_bias"
TABLE = "hash_table"
"""Buffers of routers that files may hold."""
TABLE_THERE = "tid2eid"
USUAL_MLP = ("gate_proj", "up_proj", "down_proj")
NUMBERED_MLP = ("w1", "w3", "w2")
"""Gate, up and down of an MLP."""


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
    columns: int | None = None
    """Columns of a matrix on disk whose rows, end to end, are the part, a vector; None: no such."""

    @property
    def shape_there(self) -> Shape:
        """Of the tensor on disk, or of one entry of a stacked one."""
        if self.columns is not None:
            return (self.shape[0] // self.columns, self.columns)
        return self.shape[::-1] if self.is_transposed else self.shape


Parts = dict[str, tuple[Part, ...]]


def parts_of(reading: Reading) -> Parts:
    """Key of a checkpoint -> its parts, in the order of the layers. Buffers are "buffer/<name>"."""
    if reading.family.attention == "compressed":
        return _of_deepseek_v4(reading)
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


def respelled(name: str, family: Family) -> str:
    """A tensor's name as the Hub has it, of one that transformers may have written."""
    for pattern, instead in family.respelled.items():
        name = re.sub(pattern, instead, name)
    return name


def _of_deepseek_v4(reading: Reading) -> Parts:
    """Likewise of DeepSeek-V4, whose files are named as its authors' code is."""
    model = reading.model
    hidden, streams = model["hidden_size"], model["num_residual_streams"]
    found: Parts = {"embedding.weight": (Part("embed.weight", (model["vocab_size"], hidden)),)}
    kinds = compressed_kinds(model["num_layers"], reading.attention)
    for layer, kind in enumerate(kinds):
        ours, theirs = f"blocks.{layer}", f"layers.{layer}"
        for name in ("attention", "mlp"):
            short = {"attention": "attn", "mlp": "ffn"}[name]
            norm = Part(f"{theirs}.{short}_norm.weight", (hidden,))
            found[f"{ours}.{name}_norm.weight"] = (norm,)
            rows = streams * (streams + 2)
            found |= _streams(f"{ours}.{name}_streams", f"{theirs}.hc_{short}", model, rows, 3)
        found |= _compressed(f"{ours}.attention", f"{theirs}.attn", reading, kind)
        experts = _experts(f"{ours}.mlp", f"{theirs}.{reading.family.mlp}", model, reading.family)
        if layer < reading.router["hash_layers"]:
            del experts[f"buffer/{ours}.mlp.router.{BIAS}"]
            shape = (model["vocab_size"], model["top_k"])
            table = Part(f"{theirs}.{reading.family.mlp}.gate.{TABLE_THERE}", shape)
            experts[f"buffer/{ours}.mlp.router.{TABLE}"] = (table,)
        found |= experts
    found |= _streams("streams", "hc_head", model, streams, 1)
    found["norm.weight"] = (Part("norm.weight", (hidden,)),)
    if not model["tie_embeddings"]:
        found["head.weight"] = (Part("head.weight", (model["vocab_size"], hidden)),)
    return found


def _streams(ours: str, theirs: str, model: Settings, rows: int, scales: int) -> Parts:
    """What reads, writes and mixes several residual streams."""
    width = model["num_residual_streams"] * model["hidden_size"]
    return {
        f"{ours}.weight": (Part(f"{theirs}_fn", (rows, width)),),
        f"{ours}.bias": (Part(f"{theirs}_base", (rows,)),),
        f"{ours}.scale": (Part(f"{theirs}_scale", (scales,)),),
    }


def _compressed(ours: str, theirs: str, reading: Reading, kind: str) -> Parts:
    """Attention to a window and, of kinds with them, to pooled entries."""
    model, attention = reading.model, reading.attention
    hidden, heads, head = model["hidden_size"], model["num_heads"], model["head_dim"]
    rank, groups = attention["q_lora_rank"], attention["output_groups"]
    between = groups * attention["o_lora_rank"]
    found: Parts = {f"{ours}.sinks": (Part(f"{theirs}.attn_sink", (heads,)),)}

    def add(name: str, there: str, shape: Shape) -> None:
        found[f"{ours}.{name}.weight"] = (Part(f"{theirs}.{there}.weight", shape),)

    def add_pool(name: str, there: str, width: int, ratio: int, row: int) -> None:
        add(f"{name}.kv_proj", f"{there}.wkv", (row, hidden))
        add(f"{name}.gate_proj", f"{there}.wgate", (row, hidden))
        slots = Part(f"{theirs}.{there}.ape", (ratio * row,), columns=row)
        found[f"{ours}.{name}.slot_bias"] = (slots,)
        add(f"{name}.norm", f"{there}.norm", (width,))

    add("q_a_proj", "wq_a", (rank, hidden))
    add("q_a_norm", "q_norm", (rank,))
    add("q_b_proj", "wq_b", (heads * head, rank))
    add("kv_proj", "wkv", (head, hidden))
    add("kv_norm", "kv_norm", (head,))
    add("output_groups", "wo_a", (between, heads * head // groups))
    add("o_proj", "wo_b", (hidden, between))
    if kind != "window":
        ratio = attention[f"{kind}_ratio"]
        add_pool("compressor", "compressor", head, ratio, head * (2 if kind == "csa" else 1))
    if kind == "csa":
        width, index_heads = attention["index_head_dim"], attention["index_heads"]
        add("indexer.q_proj", "indexer.wq_b", (index_heads * width, rank))
        add("indexer.weights_proj", "indexer.weights_proj", (index_heads, hidden))
        pool = "indexer.compressor"
        add_pool(pool, pool, width, attention["csa_ratio"], 2 * width)
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
        shared_width = model["num_shared_experts"] * width
        names = NUMBERED_MLP if family.experts == NUMBERED else USUAL_MLP
        found |= _swiglu(f"{ours}.shared", shared, hidden, shared_width, names)
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


def _swiglu(
    ours: str,
    theirs: str,
    hidden: int,
    width: int,
    names: tuple[str, str, str] = USUAL_MLP,
) -> Parts:
    gate, up, down = names
    return {
        f"{ours}.gate_up.weight": (
            Part(f"{theirs}.{gate}.weight", (width, hidden)),
            Part(f"{theirs}.{up}.weight", (width, hidden)),
        ),
        f"{ours}.down.weight": (Part(f"{theirs}.{down}.weight", (hidden, width)),),
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
    columns: int | None = None
    """As Part.columns."""


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
            place = Place(key, row, part.shape[0], part.order, part.is_transposed, part.columns)
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
    if reading.family.attention == "compressed" and name.startswith("mtp."):
        return bool(reading.num_further_layers)
    if name == "lm_head.weight":
        return bool(reading.model["tie_embeddings"])
    layer = name.removeprefix("model.layers.").partition(".")[0]
    return (
        layer.isdigit()
        and int(layer) >= reading.model["num_layers"]
        and bool(reading.num_further_layers)
    )
