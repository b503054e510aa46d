"""The divergence from a teacher against torch's, and inside the model: the same whole and in
chunks, packed and apart, with padding and masked targets.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))
from common import build, tiny_config

from model.config import BalanceConfig
from model.distillation import divergence, likeliest
from model.loss import IGNORE_INDEX, Teaching, training_loss
from model.request import SUMS_ALONE, Taught
from model.routers.config import ThresholdConfig, TopKConfig, TopPConfig
from train.data.loader import pack

TOKENS, VOCAB = 7, 11


@pytest.fixture
def words() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a model and of a teacher, and targets of which two are none."""
    torch.manual_seed(0)
    logits = torch.randn(TOKENS, VOCAB, dtype=torch.float64, requires_grad=True)
    theirs = 2 * torch.randn(TOKENS, VOCAB, dtype=torch.float64)
    targets = torch.randint(VOCAB, (TOKENS,))
    targets[[1, 4]] = IGNORE_INDEX
    return logits, theirs, targets


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_is_torchs_over_the_targets_and_its_gradient_too(words, temperature):
    logits, theirs, targets = words
    found, agreed = divergence(logits, targets, Taught(temperature), theirs)
    (gradient,) = torch.autograd.grad(found, logits)

    known = targets != IGNORE_INDEX
    log_q, log_p = ((x[known] / temperature).log_softmax(-1) for x in (logits, theirs))
    oracle = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    assert torch.allclose(found, oracle)
    assert torch.allclose(gradient, torch.autograd.grad(oracle, logits)[0])
    assert not gradient[~known].any()
    assert int(agreed) == int((logits.argmax(-1) == theirs.argmax(-1))[known].sum())
    assert torch.autograd.gradcheck(
        lambda x: divergence(x, targets, Taught(temperature), theirs)[0], logits
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("num_ids", [1, 4, VOCAB - 1])
def test_all_other_tokens_are_one_outcome_of_both(words, num_ids, temperature):
    logits, theirs, targets = words
    ids, log_probs = likeliest(theirs, num_ids, temperature)
    taught = Taught(temperature, ids=ids, log_probs=log_probs)
    found, _ = divergence(logits, targets, taught, None)

    def coarse(x: torch.Tensor) -> torch.Tensor:
        share = (x / temperature).softmax(-1)
        kept = share.gather(-1, ids)
        rest = share.scatter(-1, ids, 0.0).sum(-1, keepdim=True)
        return torch.cat((kept, rest), -1).log()

    known = targets != IGNORE_INDEX
    oracle = F.kl_div(
        coarse(logits)[known], coarse(theirs)[known], reduction="sum", log_target=True
    )
    assert torch.allclose(found, oracle)
    assert torch.allclose(*(torch.autograd.grad(x, logits)[0] for x in (found, oracle)))
    whole, _ = divergence(logits, targets, Taught(temperature), theirs)
    # equal where nothing is left out, but for the order of sums
    assert 0 <= float(found) <= float(whole) * (1 + 1e-12)
    assert torch.autograd.gradcheck(lambda x: divergence(x, targets, taught, None)[0], logits)


def test_of_the_whole_vocabulary_nothing_is_left_over(words):
    logits, theirs, targets = words
    ids, log_probs = likeliest(theirs, VOCAB, 1.0)
    assert log_probs.shape == ids.shape
    found = divergence(logits, targets, Taught(ids=ids, log_probs=log_probs), None)
    whole = divergence(logits, targets, Taught(), theirs)
    assert torch.allclose(found[0], whole[0]) and found[1] == whole[1]


def test_a_teacher_without_a_doubt_is_finite_and_has_a_gradient(words):
    """The rest has nothing, and an fp16 logarithm of nothing is infinite."""
    logits, _, targets = words
    ids = torch.arange(TOKENS).unsqueeze(1)
    log_probs = torch.tensor([0.0, -torch.inf]).expand(TOKENS, 2)
    found, _ = divergence(logits, targets, Taught(ids=ids, log_probs=log_probs), None)
    (gradient,) = torch.autograd.grad(found, logits)
    assert found.isfinite() and gradient.isfinite().all()


def test_ties_go_to_the_lower_id_and_shares_sum_to_one():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 1.0]])
    ids, log_probs = likeliest(logits, 3, 2.0)
    assert ids.tolist() == [[1, 2, 0]]
    assert float(log_probs.exp().sum()) == pytest.approx(1)


# --- in the model ---------------------------------------------------------------------------------

DOCUMENTS = [[5, 9, 3, 8, 2], [7, 4, 6, 1]]
END = 0


def model_of(**changes) -> torch.nn.Module:
    return build(tiny_config(num_dense_layers=0, num_shared_experts=0, **changes), BalanceConfig())


def taught_by(teacher, batch, temperature=1.0) -> Taught:
    return Taught(
        temperature,
        hidden=teacher.last_hidden(batch),
        weight=teacher.output_projection().detach(),
    )


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_packed_and_padded_teach_as_documents_apart(chunk, tied):
    device = torch.device("cpu")
    student = model_of(loss_chunk_size=chunk, tie_embeddings=tied).eval()
    teacher = build(tiny_config(hidden_size=24, logits_divisor=2.0), BalanceConfig(), seed=3).eval()
    packed = [[token for document in DOCUMENTS for token in (*document, END)]]

    def sums(rows: list[list[int]]) -> tuple[float, int, torch.Tensor]:
        batch = pack(rows, 14, END).inputs(device)
        taught = taught_by(teacher, batch, 2.0)
        output = student(batch._replace(taught=taught))
        student.zero_grad()
        output.kl_sum.backward()
        gradient = student.blocks[0].attention.q_proj.weight.grad.clone()
        return float(output.kl_sum.detach()), int(output.agreed), gradient

    one, apart = sums(packed), [sums([[*document, END]]) for document in DOCUMENTS]
    assert one[0] == pytest.approx(sum(kl for kl, _, _ in apart), rel=1e-5) and one[0] > 0.01
    assert one[1] == sum(agreed for _, agreed, _ in apart)
    assert torch.allclose(one[2], sum(gradient for _, _, gradient in apart), atol=1e-6)


def test_the_teachers_logits_are_those_that_it_has_itself():
    teacher = build(tiny_config(logits_divisor=2.0), BalanceConfig()).eval()
    ids = torch.tensor([DOCUMENTS[0]])
    batch = pack([[*DOCUMENTS[0], END]], 5, END).inputs(torch.device("cpu"))
    logits = F.linear(teacher.last_hidden(batch), teacher.output_projection())
    assert torch.allclose(logits, teacher.logits(ids), atol=1e-6)


def test_a_model_that_is_its_own_teacher_learns_nothing():
    model = model_of().eval()
    batch = pack([[*DOCUMENTS[0], END]], 6, END).inputs(torch.device("cpu"))
    output = model(batch._replace(taught=taught_by(model, batch)))
    output.kl_sum.backward()
    assert abs(float(output.kl_sum.detach())) < 1e-6
    assert int(output.agreed) == len(DOCUMENTS[0])
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    assert largest < 1e-6


@pytest.mark.parametrize("router", [TopKConfig, TopPConfig, ThresholdConfig])
@pytest.mark.parametrize("training", [False, True])
def test_a_lower_budget_is_plain_top_k_whatever_the_controllers_say(router, training):
    """Every token visits its best expert, as under fixed top-1."""
    options = {} if router is TopKConfig else {"budget": 2.0}
    config = tiny_config(num_dense_layers=0, num_shared_experts=0)
    model = build(config, BalanceConfig(), router=router, **options).train(training)
    batch = pack([[*DOCUMENTS[0], END]], 6, END).inputs(torch.device("cpu"))
    before = [router.control.clone() for router in model.routers()]
    output = model(batch, SUMS_ALONE._replace(plain_k=1, keep_routing=True))
    for routing in output.routings:
        used = (routing.expert_ids >= 0).sum(1)[: len(DOCUMENTS[0])]
        assert used.tolist() == [1] * len(used)
    # As in a model that has top-1 alone, gates of one expert among others apart.
    single = build(config, BalanceConfig(), top_k=1, normalize_weights=False).train(training)
    single.load_state_dict(model.state_dict(), strict=False)
    alone = single(batch, SUMS_ALONE._replace(keep_routing=True)).routings[0]
    assert torch.equal(alone.expert_ids[:, 0], output.routings[0].expert_ids[:, 0])
    assert all(torch.equal(a, r.control) for a, r in zip(before, model.routers(), strict=True))


def test_weights_of_text_and_teacher_follow_the_temperature():
    model = model_of().eval()
    teacher = model_of(init_std=0.3).eval()
    batch = pack([[*DOCUMENTS[0], END]], 6, END).inputs(torch.device("cpu"))
    output = model(batch._replace(taught=taught_by(teacher, batch, 2.0)))
    loss = training_loss(output, 5, 6, BalanceConfig(), teaching=Teaching.of(0.25, 2.0))
    plain = training_loss(output, 5, 6, BalanceConfig())
    wanted = float(plain) - 0.25 * float(output.loss_sum) / 5 + 0.25 * 4 * float(output.kl_sum) / 5
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    none = training_loss(output, 5, 6, BalanceConfig(), teaching=Teaching.of(0.0, 2.0))
    assert float(none) == float(plain)
