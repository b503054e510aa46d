"""The routing audit: what is written, what comes back, and that training never notices."""

from __future__ import annotations

import itertools
import json
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from launch import audit as command
from launch.config.build import ConfigError
from ops.router import Reason, RouterOutput
from train.audit import files as audit_files
from train.audit import format as audit_format
from train.audit import log as audit_log
from train.audit.format import gate_code, gate_value, is_sampled
from train.audit.log import AuditLog
from train.audit.records import read_records, read_steps
from train.config.watching import AuditConfig

CONF = str(Path(__file__).resolve().parent.parent.parent / "conf")
NUM_EXPERTS = 40
ALL = AuditConfig(sample_one_in=1)
"""Every token is in the sample."""
NONE = 1 << 60
"""sample_one_in that leaves the sample empty."""


def routing(
    num_tokens: int, seed: int = 0, num_slots: int = 4, reasons: dict[int, int] | None = None
) -> RouterOutput:
    """Random experts for every token, from none to num_slots, unused slots anywhere; reasons by
    token index.
    """
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, NUM_EXPERTS, generator=g).topk(num_slots).indices
    ids = torch.where(torch.rand(ids.shape, generator=g) < 0.45, -1, ids).int()
    weights = torch.where(ids >= 0, torch.exp2(6 * torch.rand(ids.shape, generator=g) - 5), 0)
    bits = torch.zeros(num_tokens, dtype=torch.uint8)
    for token, reason in (reasons or {}).items():
        bits[token] = reason
    margin, entropy = torch.rand(num_tokens, generator=g), 4 * torch.rand(num_tokens, generator=g)
    unused = dict.fromkeys(RouterOutput._fields, torch.empty(0))
    return RouterOutput(
        **{
            **unused,
            "weights": weights.requires_grad_(),
            "expert_ids": ids,
            "margin": margin,
            "entropy": entropy,
            "reasons": bits,
        }
    )


def ids_from(first: int, rows: int, columns: int) -> torch.Tensor:
    return torch.arange(first, first + rows * columns).view(rows, columns)


def write_steps(folder: Path, steps: range, resume_step: int | None = None, **options) -> None:
    """A run of one rank and two layers, in which every step has two micro-batches of 4 x 16
    tokens.
    """
    log = AuditLog(folder, AuditConfig(sample_one_in=3), (1, 3), 0, resume_step, **options)
    for step in steps:
        for micro in range(2):
            first = (step * 2 + micro) * 64
            layers = tuple(routing(64, first + layer, reasons={5: 1}) for layer in (0, 1))
            log.add(step, ids_from(first, 4, 16), None, layers)
        log.end_step(step, step * 128, [step, -step])
    log.close()


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- records --------------------------------------------------------------------------------------


def test_every_field_comes_back(tmp_path):
    first = 3 * 2**32 - 50  # the low 32 bits start anew within the step
    layers = (routing(96, 1, reasons={3: 9}), routing(96, 2, reasons={7: 255}))
    log = AuditLog(tmp_path, ALL, (2, 5), 0)
    log.add(7, ids_from(first, 3, 32), None, layers)
    log.end_step(7, first, [1, -1])
    log.close()
    records = read_records(tmp_path)
    assert (records.step == 7).all() and records.sampled.all()
    assert records.layer.tolist() == [2] * 96 + [5] * 96
    assert records.token.tolist() == [*range(first, first + 96)] * 2
    for layer, out in enumerate(layers):
        part = records.take(np.arange(96 * layer, 96 * layer + 96))
        assert part.reasons.tolist() == out.reasons.tolist()
        np.testing.assert_array_equal(
            part.margin, out.margin.numpy().astype(np.float16).astype(np.float32)
        )
        np.testing.assert_array_equal(
            part.entropy, out.entropy.numpy().astype(np.float16).astype(np.float32)
        )
        used = out.expert_ids >= 0
        assert part.k.tolist() == used.sum(1).tolist() and {0, 4} <= set(part.k.tolist())
        assert part.experts.tolist() == out.expert_ids[used].tolist()
        np.testing.assert_allclose(part.gates, out.weights.detach()[used].numpy(), rtol=0.022)


def test_a_record_is_16_bytes_and_3_per_expert(tmp_path):
    out = routing(64)
    log = AuditLog(tmp_path, ALL, (0,), 4, num_ranks=5)
    log.add(1, ids_from(0, 1, 64), None, (out,))
    log.close()
    assert (tmp_path / "records-00004.bin").stat().st_size == 64 * 16 + 3 * int(
        (out.expert_ids >= 0).sum()
    )


def test_gate_codes_are_within_2_percent_and_keep_their_order():
    gates = np.concatenate(
        (np.geomspace(0.017, 3.8, 5000, dtype=np.float32), [0, 1e-9, 1, 1e9, np.nan, np.inf])
    )
    back = gate_value(gate_code(gates))
    np.testing.assert_allclose(back[:5000], gates[:5000], rtol=0.011)
    assert (np.diff(back[:5000]) >= 0).all()
    assert (
        gate_code(gates)[5000:].tolist() == [0, 1, 192, 255, 0, 255]
        and back[5000] == 0
        and back[5002] == 1
    )


def test_numbers_beyond_half_precision_are_clipped(tmp_path):
    out = routing(2)._replace(margin=torch.tensor([1e9, -1e9]))
    log = AuditLog(tmp_path, ALL, (0,), 0)
    log.add(1, ids_from(0, 1, 2), None, (out,))
    log.close()
    assert read_records(tmp_path).margin.tolist() == [65504, -65504]


def test_the_format_file_is_enough_to_read_the_records(tmp_path):
    log = AuditLog(tmp_path, ALL, (1,), 0)
    out = routing(40, reasons={2: int(Reason.NONFINITE | Reason.OVERFLOW)})
    log.add(3, ids_from(100, 2, 20), None, (out,))
    log.close()
    facts = json.loads((tmp_path / "format.json").read_text())
    letters = {"uint8": "B", "uint16": "H", "uint32": "I", "float16": "e"}
    fixed, each = (
        "<" + "".join(letters[field["type"]] for field in facts[part])
        for part in ("record", "then_k_times")
    )
    data, at, token = (tmp_path / "records-00000.bin").read_bytes(), 0, 0
    while at < len(data):
        fields = dict(
            zip(
                (f["name"] for f in facts["record"]),
                struct.unpack_from(fixed, data, at),
                strict=True,
            )
        )
        at += struct.calcsize(fixed)
        assert (fields["step"], fields["token"], fields["layer"]) == (
            3,
            100 + token,
            facts["moe_layers"][0],
        )
        experts = [
            struct.unpack_from(each, data, at + i * struct.calcsize(each))[0]
            for i in range(fields["k"])
        ]
        assert experts == [e for e in out.expert_ids[token].tolist() if e >= 0]
        if token == 2:
            assert fields["reasons"] == facts["reasons"]["nonfinite"] + facts["reasons"]["overflow"]
        at, token = at + fields["k"] * struct.calcsize(each), token + 1
    assert token == 40


def test_what_is_added_is_what_it_was_then(tmp_path):
    out = routing(64)
    before = out.margin.clone()
    log = AuditLog(tmp_path, ALL, (0,), 0)
    log.add(1, ids_from(0, 1, 64), None, (out,))
    out.margin.zero_()
    log.close()
    np.testing.assert_allclose(read_records(tmp_path).margin, before.numpy(), atol=1e-3)


def test_a_layer_without_a_token_to_write_is_fine(tmp_path):
    log = AuditLog(tmp_path, AuditConfig(NONE, max_flagged=0), (0,), 0)
    log.add(1, ids_from(0, 1, 8), None, (routing(8),))
    log.close()
    assert len(read_records(tmp_path)) == 0


# --- which tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_the_sample_is_the_same_under_every_layout(tmp_path, ranks, micro_batches):
    """Token ids 0 .. 4095, shared out as train/data/loader.py does."""
    size = 4096 // (ranks * micro_batches)
    for rank in range(ranks):
        log = AuditLog(tmp_path, AuditConfig(16, 0), (0, 1), rank, num_ranks=ranks)
        for micro in range(micro_batches):
            first = (micro * ranks + rank) * size
            log.add(1, ids_from(first, 2, size // 2), None, (routing(size), routing(size, 1)))
        log.close()
    records = read_records(tmp_path)
    expected = np.flatnonzero(is_sampled(np.arange(4096), 16)).tolist()
    assert records.token.tolist() == expected * 2
    assert 4096 / 16 * 0.7 < len(expected) < 4096 / 16 * 1.3


def test_the_hash_is_splitmix64():
    """First output of the published generator, seeds 0 and 1234567."""
    for seed, output in ((0, 0xE220A8397B1DCDAF), (1234567, 6457827717110365317)):
        for one_in in (2, 3, 5, 7, 11, 2**40 + 15):
            assert is_sampled(np.array([seed]), one_in).tolist() == [output % one_in == 0]
        assert is_sampled(np.array([seed]), output).tolist() == [True]


def test_flagged_tokens_are_written_up_to_the_cap_lowest_first(tmp_path):
    single = [r for r in Reason if r not in (Reason.OVERRIDDEN, Reason.FROZEN)]
    flagged = dict(zip((50, 3, 20, 41, 60, 9), map(int, single), strict=True))
    log = AuditLog(tmp_path, AuditConfig(NONE, max_flagged=4), (0, 1), 0)
    layer_wide = dict.fromkeys(range(64), int(Reason.OVERRIDDEN | Reason.FROZEN))
    layers = routing(64, reasons=layer_wide), routing(64, 1, reasons={**layer_wide, **flagged})
    log.add(1, ids_from(0, 4, 16), None, layers)
    log.end_step(1, 0, None)
    log.add(2, ids_from(64, 4, 16), None, (routing(64, reasons={5: 1}), routing(64, 1)))
    log.end_step(2, 64, None)
    log.close()
    records = read_records(tmp_path)
    assert list(zip(records.step, records.layer, records.token, strict=True)) == [
        (1, 1, 3),
        (1, 1, 9),
        (1, 1, 20),
        (1, 1, 41),
        (2, 0, 69),
    ]
    assert (
        records.reasons.tolist() == [flagged[t] for t in (3, 9, 20, 41)] + [1]
        and not records.sampled.any()
    )
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["flagged_dropped"] for line in lines] == [2, 0]


def test_a_token_both_sampled_and_flagged_is_written_once(tmp_path):
    log = AuditLog(tmp_path, AuditConfig(4, max_flagged=64), (0,), 0)
    log.add(1, ids_from(0, 4, 16), None, (routing(64, reasons=dict.fromkeys(range(64), 2)),))
    log.close()
    records = read_records(tmp_path)
    assert records.token.tolist() == [*range(64)]
    log = AuditLog(tmp_path, AuditConfig(4, max_flagged=64), (0,), 0)
    log.add(1, ids_from(0, 4, 16), None, (routing(64),))
    log.end_step(1, 0, None)
    log.close()
    assert (
        read_records(tmp_path).token.tolist()
        == np.flatnonzero(is_sampled(np.arange(64), 4)).tolist()
    )


def test_all_ranks_count_what_they_drop(tmp_path):
    for rank in range(3):
        log = AuditLog(tmp_path, AuditConfig(NONE, max_flagged=2), (0,), rank, num_ranks=3)
        log.add(
            1,
            ids_from(64 * rank, 4, 16),
            None,
            (routing(64, reasons=dict.fromkeys(range(rank * 3), 1)),),
        )
        log.end_step(1, 0, [5])
        log.close()
    assert read_steps(tmp_path).flagged_dropped == 1 + 4
    assert sorted(p.name for p in tmp_path.glob("*.jsonl")) == [
        "dropped-00001.jsonl",
        "dropped-00002.jsonl",
        "steps.jsonl",
    ]


def test_padding_is_never_written(tmp_path):
    mask = torch.ones(4, 16, dtype=torch.bool)
    mask[1, 10:] = mask[3] = False
    log = AuditLog(tmp_path, AuditConfig(2), (0,), 0)
    log.add(1, ids_from(0, 4, 16), mask, (routing(64, reasons=dict.fromkeys(range(64), 1)),))
    log.close()
    assert read_records(tmp_path).token.tolist() == mask.flatten().nonzero().flatten().tolist()


# --- files over crashes and resumes ---------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 40])
def test_a_torn_record_is_not_read_and_resuming_cuts_it_off(tmp_path, cut):
    write_steps(tmp_path, range(1, 4))
    whole, path = read_records(tmp_path), tmp_path / "records-00000.bin"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - cut)
    torn = read_records(tmp_path)
    assert 0 < len(whole) - len(torn) <= cut // 16 + 1
    np.testing.assert_array_equal(torn.gates, whole.gates[: len(torn.gates)])
    AuditLog(tmp_path, ALL, (1, 3), 0, resume_step=3).close()
    assert path.stat().st_size == 16 * len(torn) + 3 * len(torn.experts)


def test_a_resumed_log_equals_an_uninterrupted_one_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(audit_files, "PIECE", 1000)  # records across pieces
    write_steps(tmp_path / "whole", range(1, 7))
    write_steps(tmp_path / "resumed", range(1, 6))
    with (tmp_path / "resumed" / "records-00000.bin").open("ab") as file:
        file.write(b"\x05\0\0\0 torn")
    with (tmp_path / "resumed" / "steps.jsonl").open("a") as file:
        file.write('{"step": 6, "first_to')
    write_steps(tmp_path / "resumed", range(4, 7), resume_step=3)
    assert bytes_of(tmp_path / "resumed") == bytes_of(tmp_path / "whole")
    assert len(read_records(tmp_path / "whole")) > 100


def test_resuming_on_fewer_ranks_drops_later_records_of_the_ranks_that_are_gone(tmp_path):
    for rank in range(4):
        log = AuditLog(tmp_path, AuditConfig(1, max_flagged=0), (0,), rank, num_ranks=4)
        for step in (1, 2):
            log.add(
                step, ids_from(64 * (4 * step + rank), 1, 64), None, (routing(64, reasons={1: 1}),)
            )
            log.end_step(step, 256 * step, [1])
        log.close()
    for rank in range(2):
        AuditLog(tmp_path, ALL, (0,), rank, resume_step=1, num_ranks=2).close()
    records = read_records(tmp_path)
    assert set(records.step) == {1} and records.token.tolist() == [*range(256, 512)]


def test_a_run_that_begins_anew_keeps_nothing(tmp_path):
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, range(1, 2), None)
    assert set(read_records(tmp_path).step) == {1} and read_steps(tmp_path).step.tolist() == [1]


def test_ids_have_64_bits_even_in_a_step_that_was_cut_short(tmp_path):
    log = AuditLog(tmp_path, ALL, (0,), 0)
    big = 2**40 + 2**32 - 32
    log.add(1, ids_from(big, 1, 16), None, (routing(16),))
    log.end_step(1, big, [1])
    log.add(2, ids_from(big + 16, 1, 64), None, (routing(64),))
    far = big + 2**32 - 8  # as far from the first token as 32 bits reach
    log.add(2, ids_from(far, 1, 8), None, (routing(8),))
    log.close()
    second = [*range(big + 16, big + 80), *range(far, far + 8)]
    assert read_records(tmp_path).token.tolist() == [*range(big, big + 16), *second]
    assert read_records(tmp_path, step=2).token.tolist() == second


def test_checksums_are_16_hex_digits_from_a_list_or_a_tensor(tmp_path):
    log = AuditLog(tmp_path, ALL, (0, 1), 0)
    sums = torch.tensor([255, -1])
    log.end_step(1, 0, sums)
    sums.zero_()
    log.end_step(2, 64, [255, -1])
    log.end_step(3, 128, None)
    log.close()
    assert read_steps(tmp_path).checksums == [["00000000000000ff", "f" * 16]] * 2 + [None]


# --- training does not notice ---------------------------------------------------------------------


def test_an_error_in_the_background_switches_the_audit_off(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError("No space left on device")

    log = AuditLog(tmp_path, ALL, (0,), 0)
    monkeypatch.setattr(log, "_encode", fail)
    for step in range(1, 50):
        log.add(step, ids_from(0, 1, 16), None, (routing(16),))
        log.end_step(step, 0, [1])
    log.flush()
    log.close()
    log.add(50, ids_from(0, 1, 16), None, (routing(16),))
    log.close()
    assert caplog.text.count("switched off") == 1 and "No space left" in caplog.text


def test_a_folder_that_cannot_be_written_switches_the_audit_off(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    log = AuditLog(tmp_path / "file" / "audit", ALL, (0,), 0)
    log.add(1, ids_from(0, 1, 16), None, (routing(16),))
    log.end_step(1, 0, [1])
    log.flush()
    log.close()
    assert caplog.text.count("switched off") == 1


def test_a_slow_disk_loses_micro_batches_and_says_how_many(tmp_path, monkeypatch):
    monkeypatch.setattr(audit_log, "MAX_WAITING", 5)
    disk, encode = threading.Event(), AuditLog._encode
    monkeypatch.setattr(
        AuditLog, "_encode", lambda self, batch: encode(self, batch) if disk.wait(10) else b""
    )
    log = AuditLog(tmp_path, ALL, (0,), 0)
    for micro in range(20):
        log.add(1, ids_from(16 * micro, 1, 16), None, (routing(16),))
    log.end_step(1, 0, [1])
    disk.set()
    log.close()
    lost = read_steps(tmp_path).lost_micro_batches
    assert 14 <= lost <= 15 and len(read_records(tmp_path)) == (20 - lost) * 16


def test_flush_leaves_nothing_to_a_kill(tmp_path):
    log = AuditLog(tmp_path, ALL, (0,), 0)
    log.add(1, ids_from(0, 1, 16), None, (routing(16),))
    log.flush()
    assert len(read_records(tmp_path)) == 16
    log.close()


@pytest.mark.parametrize("width", [0, 1])
def test_an_audit_above_its_limit_keeps_whole_steps_far_back_and_every_new_one(
    tmp_path, monkeypatch, width
):
    """width 0: records of one size; 1: of two, in turn."""
    monkeypatch.setattr(audit_log, "MIB", 1)
    monkeypatch.setattr(audit_files, "PIECE", 5000)

    def write(folder, limit, steps, resume_step=None):
        log = AuditLog(
            folder, AuditConfig(1, 3, limit), (0, 2), 0, resume_step, borders=lambda: (50,)
        )
        for step in steps:
            out = routing(16, reasons={i: 1 for i in range(5)})
            ids = torch.where(
                torch.arange(16)[:, None] % 2 == 0,
                out.expert_ids,
                out.expert_ids * (1 - width) - width,
            )
            first = 2**31 * step  # ids far beyond 32 bits
            log.add(step, ids_from(first, 1, 16), None, (out, out._replace(expert_ids=ids)))
            log.end_step(step, first, [step, -step])
            if limit and step % 8 == 0:
                log.flush()
            assert not limit or (folder / "records-00000.bin").stat().st_size <= limit
        log.close()

    write(tmp_path / "whole", 0, range(1, 301))
    write(tmp_path / "thin", 60_000, range(1, 250))
    write(tmp_path / "thin", 60_000, range(241, 301), resume_step=240)
    whole, thin = read_records(tmp_path / "whole"), read_records(tmp_path / "thin")
    kept = np.unique(thin.step)
    assert 10 < len(kept) < 200 and kept[0] < 70 and {*range(285, 301)} <= set(kept)
    same = whole.take(np.isin(whole.step, kept))
    for name in ("step", "token", "layer", "reasons", "sampled", "experts", "gates"):
        np.testing.assert_array_equal(getattr(thin, name), getattr(same, name))
    steps, every = read_steps(tmp_path / "thin"), read_steps(tmp_path / "whole")
    assert set(kept) <= set(steps.step) and len(steps.step) < 300 and 50 in steps.step
    assert steps.flagged_dropped == every.flagged_dropped
    assert (
        dict(zip(steps.step, map(tuple, steps.checksums), strict=True)).items()
        <= dict(zip(every.step, map(tuple, every.checksums), strict=True)).items()
    )
    chosen = audit_files.steps_that_fit(tmp_path / "thin", 8000, 8, steps.step)
    assert chosen and set(chosen) <= set(kept) and chosen[-1] == 300
    part = read_records(tmp_path / "thin", chosen)
    assert np.unique(part.step).tolist() == chosen


# --- the command ----------------------------------------------------------------------------------

SEQ_LEN = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run directory as training leaves it, made by hand: two sources with words of their own,
    source 0 prefers expert 1 of layer 1 and gets two experts a token, source 1 gets one.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from train.config.data import TokenizerConfig
    from train.data.prepare import train_bpe
    from train.data.store import TokenStore, TrainingSamples

    folder = tmp_path_factory.mktemp("audited")
    run, store = folder / "run", folder / "cache" / "0123456789abcdef"
    (run / "data").mkdir(parents=True)
    store.mkdir(parents=True)
    texts = [
        [" ".join(words[(i * j) % len(words)] for j in range(1, 12)) for i in range(1, 30)]
        for words in (
            ["owl", "oak", "river", "fox", "dog"],
            ["zinc", "iron", "lead", "gold", "tin", "copper"],
        )
    ]
    tokenizer = train_bpe(itertools.chain(*texts), TokenizerConfig(vocab_size=300))
    tokenizer.save(str(store / "tokenizer.json"))
    eod, sources = tokenizer.token_to_id("<|endoftext|>"), []
    for i, documents in enumerate(texts):
        builder = IndexedDatasetBuilder(
            str(store / f"train_{i}.bin"), dtype=DType.optimal_dtype(300)
        )
        encoded = [[*tokenizer.encode(text).ids, eod] for text in documents]
        for ids in encoded:
            builder.add_document(torch.tensor(ids), [len(ids)])
        builder.finalize(str(store / f"train_{i}.idx"))
        sources.append({"path": f"source{i}", "tokens": sum(map(len, encoded))})
    manifest = {
        "fingerprint": store.name,
        "content": "c",
        "vocab_size": 300,
        "end_of_document": eod,
        "unigram_entropy": 1.0,
        "sources": sources,
    }
    for place in (store, run / "data"):
        (place / "manifest.json").write_text(json.dumps(manifest))
    source = "{path: text, data_files: gone.txt}"
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose(
            "train",
            overrides=[
                "model.vocab_size=300",
                "model.num_layers=2",
                "model.num_experts=4",
                f"train.seq_len={SEQ_LEN}",
                f"data.cache_dir={folder / 'cache'}",
                "~data.sources",
                f"+data.sources=[{source}, {source}]",
            ],
        )
    OmegaConf.save(config, run / "config.yaml")

    samples = TrainingSamples(TokenStore(store), (1.0, 1.0), SEQ_LEN, config.seed)
    log = AuditLog(run / audit_format.FOLDER, AuditConfig(sample_one_in=2), (0, 1), 0)
    for step in range(1, 6):
        first = (step - 1) * 4
        source = torch.tensor(
            [samples._locate(i)[0] for i in range(first, first + 4)]
        ).repeat_interleave(SEQ_LEN)
        routings = []
        for layer in range(2):
            favourite = torch.where((source == 0) & (layer == 1), 1, 2)
            ids = torch.stack((favourite, torch.where(source == 0, 3, -1)), 1).int()
            reasons = dict.fromkeys([4] if layer == 0 else [], int(Reason.NONFINITE))
            routings.append(
                routing(4 * SEQ_LEN, reasons=reasons)._replace(
                    expert_ids=ids, weights=torch.where(ids >= 0, 0.5, 0.0)
                )
            )
        log.add(step, ids_from(first * SEQ_LEN, 4, SEQ_LEN), None, tuple(routings))
        log.end_step(step, first * SEQ_LEN, [step, 2 * step])
    log.close()
    return run


def ask(run: Path, capsys, **settings) -> tuple[list[str], dict]:
    """Lines and final JSON of `python -m launch.audit run=RUN ...`."""
    config = OmegaConf.merge(
        OmegaConf.load(Path(CONF) / "audit.yaml"), {"run": str(run), **settings}
    )
    assert isinstance(config, type(OmegaConf.create()))
    command.main(config)
    *lines, last = capsys.readouterr().out.strip().splitlines()
    return lines, json.loads(last)


def test_the_summary_counts_the_sample(run, capsys):
    lines, result = ask(run, capsys, limit=0)
    sampled = is_sampled(np.arange(20 * SEQ_LEN), 2)
    flagged_only = sum(not sampled[step * 4 * SEQ_LEN + 4] for step in range(5))
    assert (
        result["sampled"] == 2 * sampled.sum()
        and result["records"] == result["sampled"] + flagged_only
    )
    assert (
        result["steps"] == 5 and result["sample_one_in"] == [2] and result["flagged_dropped"] == 0
    )
    layer = result["layers"][0]
    assert layer["reasons"].keys() == {"nonfinite"} and result["layers"][1]["reasons"] == {}
    assert layer["mean_k"] == pytest.approx(1.5, abs=0.1)
    assert [s["mean_k"] for s in result["sources"]] == [2, 1]
    assert [e["expert"] for e in layer["experts"][:2]] == [2, 3]


def test_sources_show_in_experts_and_in_their_words(run, capsys):
    _, result = ask(run, capsys, limit=0)
    favourite = result["sources"][0]["experts"][1]
    assert (favourite["layer"], favourite["expert"]) == (1, 1) and favourite[
        "lift"
    ] == pytest.approx(1.5, abs=0.15)
    seen = {
        e["expert"]: {text.strip() for text, _ in e["tokens"]}
        for e in result["layers"][1]["experts"]
    }
    assert seen[1] & {"owl", "oak", "fox", "dog", "river"} and not seen[1] & {
        "zinc",
        "iron",
        "lead",
        "gold",
        "tin",
    }
    assert seen[2] & {"zinc", "iron", "lead", "gold", "tin", "copper"}


def test_records_show_the_token_that_stands_there(run, capsys):
    from train.data.store import TokenStore, TrainingSamples

    _, result = ask(run, capsys, limit=0)
    lines, _ = ask(run, capsys, step=3, reason="nonfinite")
    assert "1 matching records:" in lines[-3]
    token = 8 * SEQ_LEN + 4
    assert f"step 3  layer 0  token {token}" in lines[-2] and "reasons nonfinite" in lines[-2]
    store = TokenStore(run.parent / "cache" / "0123456789abcdef")
    samples = TrainingSamples(store, (1.0, 1.0), SEQ_LEN, 1234)
    samples.open(8, 9)
    row = samples.tokens(8)
    text = json.loads(lines[-1].strip())
    assert text.split("⟦")[1].split("⟧")[0] == store.tokenizer().decode(
        [row[4]], skip_special_tokens=False
    )
    assert text.replace("⟦", "").replace("⟧", "") == store.tokenizer().decode(
        row[:11].tolist(), skip_special_tokens=False
    )


@pytest.mark.parametrize(
    ("settings", "number"),
    [
        ({"expert": 0}, 0),
        ({"token": 8 * SEQ_LEN + 4, "layer": 0}, 1),
        ({"reason": "nonfinite"}, 5),
        ({"reason": "overflow"}, 0),
        ({"reason": "nonfinite", "layer": 1}, 0),
    ],
)
def test_filters_choose_the_records_listed(run, capsys, settings, number):
    lines, result = ask(run, capsys, **settings)
    assert result["matching"] == number
    assert sum(line.startswith("step ") for line in lines) == number


def test_without_the_store_ids_are_printed_and_one_line_says_why(run, capsys):
    store = run.parent / "cache" / "0123456789abcdef"
    hidden = store.rename(store.with_name("hidden"))
    try:
        lines, result = ask(run, capsys, limit=3)
    finally:
        hidden.rename(store)
    assert sum("token ids without text" in line for line in lines) == 1
    assert [line.startswith("step 1") for line in lines[-3:]] == [
        True
    ] * 3 and "sources" not in result
    assert "no file matches" in next(line for line in lines if "without text" in line)


def test_compare_names_the_first_difference(run, tmp_path, capsys):
    config = (run / "config.yaml").read_text()
    for name, sums in (
        ("same", [[s, 2 * s] for s in range(1, 4)]),
        ("other", [[1, 2], [2, 5], [9, 9]]),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(config)
        log = AuditLog(tmp_path / name / audit_format.FOLDER, ALL, (0, 1), 0)
        for step, both in enumerate(sums, start=1):
            log.end_step(step, 0, both)
        log.close()
    lines, result = ask(run, capsys, compare=str(tmp_path / "same"), limit=0)
    assert (
        "agrees" in lines[0]
        and "all 3 common steps" in lines[0]
        and result["compare"]["step"] is None
    )
    lines, result = ask(run, capsys, compare=str(tmp_path / "other"), limit=0)
    assert "step 2, layer 1" in lines[0] and result["compare"] == {
        "common_steps": 3,
        "step": 2,
        "layer": 1,
    }


def test_of_a_large_audit_some_steps_are_read_and_it_is_said(run, capsys, monkeypatch):
    size = (run / audit_format.FOLDER / "records-00000.bin").stat().st_size
    monkeypatch.setattr(command, "MAX_BYTES", size // 2)
    lines, result = ask(run, capsys, limit=0)
    assert "steps of it are read, spread evenly" in lines[0] and 1 <= result["steps"] < 5
    assert ask(run, capsys, limit=0, step=2)[1]["steps"] == 1


def test_a_run_without_audit_is_told_how_to_get_one(run, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(ValueError, match=r"train with audit\.sample_one_in=256"):
        ask(tmp_path, capsys)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reason": "late"}, "choose one of nonfinite, empty, raised"),
        ({"layer": 9}, "choose one of 0, 1"),
        ({"limit": -1}, "limit is -1"),
        ({"expert": 4}, "experts 0 to 3"),
        ({"step": "x"}, "step is 'x'; it must be a whole number"),
    ],
)
def test_bad_settings_get_a_sentence(run, capsys, settings, words):
    with pytest.raises((ValueError, ConfigError), match=words):
        ask(run, capsys, **settings)


def test_an_audit_that_begins_has_lost_nothing_and_one_whose_steps_are_gone_says_so(
    tmp_path, caplog
):
    write_steps(tmp_path / "audit", range(1, 4))
    assert not caplog.messages
    (tmp_path / "audit/steps.jsonl").unlink()
    write_steps(tmp_path / "audit", range(3, 5), resume_step=2)
    assert "steps.jsonl is gone: its records up to step 2 are lost" in caplog.text
