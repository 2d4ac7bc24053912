"""`OTGuidance`: the direction is the one of METHOD, for every target, form, cost and class size."""

import math

import pytest
import scipy.fft
import torch
from distill.surroundings import SURROUNDINGS

from otdd.distill.config import ConfigError, GuidanceConfig
from otdd.distill.guidance import OTGuidance, pick_reference, rng
from otdd.ops import METRICS, cost_matrix, sinkhorn

PLAIN = {"repulsion": 0.0, "strength": 0.5, "detail": 0.0}


def reference(counts=(30, 20), shift: float = 2.0):
    generator = torch.Generator().manual_seed(0)
    latents = [
        shift * k + torch.randn(n, 1, 4, 4, generator=generator) for k, n in enumerate(counts)
    ]
    return torch.cat(latents), torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def guided(**settings) -> OTGuidance:
    guidance = OTGuidance(GuidanceConfig(**{**PLAIN, **settings}))
    guidance.set_reference(*reference())
    return guidance


def latents(labels) -> torch.Tensor:
    return torch.randn(len(labels), 1, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("form", ["projection", "gradient"])
def test_direction_of_one_class_is_the_definition(metric, form):
    real, _ = reference((30,))
    guidance = OTGuidance(GuidanceConfig(metric=metric, form=form, **PLAIN))
    guidance.set_reference(real, torch.zeros(30, dtype=torch.int64))
    z = latents(range(5))
    seen = guidance.direction(z, 0, torch.zeros(5, dtype=torch.int64), alpha_bar=0.5)
    x, y = z.flatten(1).double().requires_grad_(), real.flatten(1).double()
    C = cost_matrix(x, y, metric)
    eps = 0.1 * C.detach().std(unbiased=False).item()
    plan = sinkhorn(C.detach(), eps=eps, max_iter=20).plan
    if form == "projection":
        want = x.detach() - plan @ y * 5
    else:
        (want,) = torch.autograd.grad((plan * C).sum(), x)
    torch.testing.assert_close(seen.flatten(1).double(), want, rtol=1e-3, atol=1e-4)


def test_l1_gradient_is_the_sum_of_signs():
    real, _ = reference((40,))
    guidance = OTGuidance(GuidanceConfig(metric="l1", form="gradient", **PLAIN))
    guidance.set_reference(real, torch.zeros(40, dtype=torch.int64))
    z = latents(range(1))
    g = guidance.direction(z, 0, torch.zeros(1, dtype=torch.int64)).flatten()
    want = torch.sign(z.flatten(1) - real.flatten(1)).mean(0)  # N = 1: the plan is uniform
    torch.testing.assert_close(g, want, rtol=1e-4, atol=1e-5)


def test_a_single_latent_is_pulled_to_the_coordinate_median():
    real, _ = reference((41,))
    guidance = OTGuidance(GuidanceConfig(metric="l1", form="gradient", repulsion=0.0, strength=1))
    guidance.set_reference(real, torch.zeros(41, dtype=torch.int64))
    z, label = torch.full((1, 1, 4, 4), 3.0), torch.zeros(1, dtype=torch.int64)
    for _ in range(400):
        z = z - 0.05 * guidance.direction(z, 0, label)
    torch.testing.assert_close(z[0], real.median(0).values, rtol=0, atol=0.1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("form", ["projection", "gradient"])
@pytest.mark.parametrize("repulsion", [0.0, 0.3])
def test_steps_lower_the_transport_cost(metric, form, repulsion):
    guidance = guided(metric=metric, form=form, repulsion=repulsion, strength=0.2)
    labels = torch.tensor([0, 1, 1, 0, 1])
    z = 2 * latents(labels)
    before = guidance.transport_cost(z, labels)
    for _ in range(5):
        z = guidance(z, 0, labels, alpha_bar=0.5, output_rms=200.0)
    assert (guidance.transport_cost(z, labels) < before).all()


def test_classes_do_not_mix_and_ragged_classes_are_exact():
    guidance = guided()
    labels = torch.tensor([1, 0, 1, 1])
    z = latents(labels)
    together = guidance.direction(z, 0, labels)
    for k in (0, 1):
        alone = guidance.direction(z[labels == k], 0, labels[labels == k])
        torch.testing.assert_close(together[labels == k], alone, rtol=1e-4, atol=1e-5)


def test_finished_latents_take_their_share_of_the_plan():
    guidance = guided()
    labels = torch.zeros(1, dtype=torch.int64)
    z, past = latents(labels), reference((3,))[0]
    memory = (past, torch.zeros(3, dtype=torch.int64))
    seen = guidance.direction(z, 0, labels, memory=memory)
    joint = guidance.direction(torch.cat([z, past]), 0, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(seen, joint[:1], rtol=1e-4, atol=1e-5)
    short = guided(memory=2)
    kept = guidance.direction(z, 0, labels, memory=(past[1:], memory[1][1:]))
    torch.testing.assert_close(short.direction(z, 0, labels, memory=memory), kept)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("form", ["projection", "gradient"])
@pytest.mark.parametrize("target", ["x0", "q_sample"])
def test_costs_of_finished_latents_are_kept_and_are_right(metric, form, target, monkeypatch):
    settings = {"metric": metric, "form": form, "target": target, "repulsion": 0.3, "memory": 3}
    guidance = guided(**settings)
    labels, past_labels = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([1, 0, 0, 0, 0])
    z, past = latents(labels), reference((5,))[0]

    def fresh(memory, t, z=z, labels=labels):
        return guided(**settings).direction(z, t, labels, alpha_bar=0.5, memory=memory)

    def check(memory, t, z=z, labels=labels):
        seen = guidance.direction(z, t, labels, alpha_bar=0.5, memory=memory)
        assert torch.equal(seen, fresh(memory, t, z, labels))

    memory = (past, past_labels)
    check(memory, 5)
    check(memory, 4, 2 * z)  # the next step: references of q_sample have other noise
    check(memory, 4, z[labels == 1], labels[labels == 1])  # other classes of the same memory
    check(memory, 4)
    past[0] += 1.0  # in place
    check(memory, 4)
    check((past.clone(), 1 - past_labels), 4)
    check((past[1:], past_labels[1:]), 4)  # nothing of class 1
    check((past[:0], past_labels[:0]), 4)
    assert torch.equal(fresh((past[:0], past_labels[:0]), 4), fresh(None, 4))
    guidance.set_reference(*(t[:40] for t in reference()))
    seen = guidance.direction(z, 4, labels, alpha_bar=0.5, memory=memory)
    assert not torch.equal(seen, fresh(memory, 4))

    calls = []
    counted = lambda x, *rest: calls.append(x.shape[1]) or cost_matrix(x, *rest)  # noqa: E731
    monkeypatch.setattr("otdd.distill.guidance.cost_matrix", counted)
    plain = guided(**{**settings, "repulsion": 0.0})
    for t in (3, 2, 1):
        plain.direction(z, t, labels, alpha_bar=0.5, memory=memory)
    kept = target == "x0"
    assert sum(calls) == (3 if kept else 9)  # rows of the largest class


def frequencies(rows: torch.Tensor) -> torch.Tensor:
    """Of rows (N, C, H, W), in float64."""
    return torch.from_numpy(scipy.fft.dctn(rows.double().numpy(), axes=(2, 3), norm="ortho"))


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 5, 7), (2, 1, 6), (4, 1, 1)])
@pytest.mark.parametrize("target", ["x0", "q_sample"])
@pytest.mark.parametrize("repulsion", [0.0, 0.3])
def test_detail_is_moved_by_what_projections_keep_of_it(shape, target, repulsion):
    counts, labels = (30, 7), torch.tensor([0, 1, 0, 0])
    draw = torch.Generator().manual_seed(0)
    real = [k + torch.randn(n, *shape, generator=draw) for k, n in enumerate(counts)]
    z = torch.randn(4, *shape, generator=draw)
    moves = []
    for detail in (0.0, 0.4):
        settings = {"detail": detail, "target": target, "repulsion": repulsion}
        guidance = OTGuidance(GuidanceConfig(**settings))
        guidance.set_reference(torch.cat(real), torch.tensor([0] * 30 + [1] * 7))
        moves.append(guidance.direction(z, 3, labels, alpha_bar=0.6))
    for k, own in enumerate(real):
        if target == "q_sample":
            padded = torch.randn(30, own[0].numel(), generator=rng(0, "q_sample", k, 3))
            own = 0.6**0.5 * own + 0.4**0.5 * padded[: len(own)].view_as(own)
        projection = (z - moves[0])[labels == k]
        kept, there = (frequencies(rows).square().mean((0, 1)) for rows in (projection, own))
        around = [
            [(slice(max(0, u - 1), u + 2), slice(max(0, v - 1), v + 2)) for v in range(shape[2])]
            for u in range(shape[1])
        ]
        share = [[kept[at].sum() / there[at].sum() for at in row] for row in around]
        chance = int((labels == k).sum()) / counts[k]
        share = torch.tensor(share)
        gain = ((share - chance) / (1 - chance) / 0.4).clamp(0, 1)
        restored = frequencies(projection) / share.sqrt().clamp_min(0.4)
        want = gain * (frequencies(z[labels == k]) - restored)
        seen = frequencies(moves[1][labels == k])
        torch.testing.assert_close(seen, want, rtol=1e-4, atol=1e-5)


def test_what_moves_whole_has_the_energy_of_the_real_latents():
    draw = torch.Generator().manual_seed(0)
    levels = torch.randn(200, 1, 1, 1, generator=draw)  # which a mean of 40 has less of
    real = levels.expand(200, 1, 6, 6)
    z, labels = torch.randn(5, 1, 6, 6, generator=draw), torch.zeros(5, dtype=torch.int64)

    def moved(detail):
        guidance = OTGuidance(GuidanceConfig(detail=detail, repulsion=0.0))
        guidance.set_reference(real, torch.zeros(200, dtype=torch.int64))
        return z - guidance.direction(z, 0, labels)

    level = real.square().mean().sqrt()
    assert moved(0.0).square().mean().sqrt() < 0.95 * level
    torch.testing.assert_close(moved(0.3).mean((2, 3)).square().mean().sqrt(), level)


def test_what_lines_up_moves_whole_and_unlike_detail_stays():
    draw = torch.Generator().manual_seed(0)
    alike = torch.randn(1, 1, 8, 8, generator=draw)
    labels, z = torch.zeros(2, dtype=torch.int64), torch.randn(2, 1, 8, 8, generator=draw)

    def move(real, detail):
        guidance = OTGuidance(GuidanceConfig(detail=detail, repulsion=0.0))
        guidance.set_reference(real, torch.zeros(len(real), dtype=torch.int64))
        return guidance.direction(z, 0, labels)

    same = alike.expand(60, 1, 8, 8)
    torch.testing.assert_close(move(same, 0.5), move(same, 0.0), rtol=1e-4, atol=1e-5)
    unlike = 3.0 + torch.randn(60, 1, 8, 8, generator=draw)  # one level, and noise around it
    seen = z - move(unlike, 0.5)
    levels = unlike.mean().expand(2)
    torch.testing.assert_close(seen.mean((1, 2, 3)), levels, rtol=0, atol=0.1)
    kept = (seen - z) - (seen - z).mean((2, 3), keepdim=True)
    assert kept.square().mean() < 0.05 * z.square().mean()
    assert (z - move(unlike, 0.0)).std() < 0.4 < 0.8 * seen[:, 0].std()


@pytest.mark.parametrize("joint", [True, False])
def test_what_a_mean_of_few_keeps_by_chance_does_not_move(joint):
    draw = torch.Generator().manual_seed(0)
    unlike = torch.randn(60, 1, 8, 8, generator=draw)
    settings = {"lambda_1": 1e-3, "max_iter": 200, "repulsion": 0.0}  # each latent has its own
    whole, held = (OTGuidance(GuidanceConfig(detail=d, **settings)) for d in (0.0, 1.0))
    for guidance in (whole, held):
        guidance.set_reference(unlike, torch.zeros(60, dtype=torch.int64))
    z = torch.randn(20, 1, 8, 8, generator=draw)
    labels = torch.zeros(20, dtype=torch.int64)
    memory = None if joint else (z[10:], labels[10:])
    flying = 20 if joint else 10
    blurred, kept = (
        g.direction(z[:flying], 0, labels[:flying], memory=memory) for g in (whole, held)
    )
    assert (z[:flying] - blurred).square().mean() > 0.2 * unlike.square().mean()  # of three
    assert kept.square().mean() < 0.05 * blurred.square().mean()


def test_detail_is_of_projections_of_latents_with_height_and_width():
    labels = torch.tensor([0, 1, 0])
    for settings in ({"form": "gradient"}, {}):
        made = []
        for detail in (0.0, 0.5):
            guidance = OTGuidance(GuidanceConfig(detail=detail, **settings))
            real, known = reference()
            flat = not settings
            guidance.set_reference(real.flatten(1) if flat else real, known)
            z = latents(labels).flatten(1) if flat else latents(labels)
            made.append(guidance.direction(z, 0, labels, alpha_bar=0.5))
        assert torch.equal(*made)


def test_a_frequency_that_no_real_latent_has_is_moved_whole():
    real = torch.ones(5, 1, 4, 4)
    guidance = OTGuidance(GuidanceConfig(repulsion=0.0))
    guidance.set_reference(real, torch.zeros(5, dtype=torch.int64))
    z = latents(range(2))
    move = guidance.direction(z, 0, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(move, z - 1, rtol=1e-4, atol=1e-5)


def test_repulsion_moves_away_from_the_other_class():
    labels = torch.tensor([0, 0, 1, 1])
    z = latents(labels)
    plain, pushed = guided(), guided(repulsion=0.4)
    a, b = (g(z, 0, labels).flatten(1).mean(1) for g in (plain, pushed))
    assert (b[:2] < a[:2]).all()  # class 0 lies below class 1
    assert (b[2:] > a[2:]).all()


@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.parametrize("settings", [{"detail": 0.5}, {"form": "gradient"}])
@pytest.mark.parametrize("target", ["x0", "q_sample"])
def test_whatever_is_set_around_it_the_direction_is_the_same(name, settings, target):
    labels, real, x = torch.tensor([0, 1, 0]), reference(), latents([0, 1, 0])

    def moved():
        config = GuidanceConfig(target=target, reference_size=15, repulsion=0.3, **settings)
        guidance = OTGuidance(config)
        guidance.set_reference(*real)
        direction = guidance.direction(x, 3, labels, alpha_bar=0.5)
        return direction, guidance.transport_cost(x, labels)

    wanted = moved()
    with SURROUNDINGS[name]():
        got = moved()
    assert all(map(torch.equal, got, wanted))


def test_noised_references():
    guidance = guided(target="q_sample")
    labels = torch.tensor([0, 1])
    z = latents(labels)
    torch.testing.assert_close(
        guidance.direction(z, 7, labels, alpha_bar=0.3),
        guidance.direction(z, 7, labels, alpha_bar=0.3),
    )
    assert not torch.allclose(
        guidance.direction(z, 7, labels, alpha_bar=0.3),
        guidance.direction(z, 8, labels, alpha_bar=0.3),
    )
    clean = guidance.direction(z, 7, labels, alpha_bar=1.0)
    torch.testing.assert_close(clean, guided().direction(z, 7, labels), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="alpha_bar is needed"):
        guidance.direction(z, 7, labels)


def test_window_and_scale():
    guidance = guided(window=(0.2, 0.6))
    assert [guidance.active(k, 10) for k in range(10)] == [False] * 2 + [True] * 4 + [False] * 4
    move = torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(guided().step(move), 0.5 * move)
    step = guided(form="gradient").step(move, alpha_bar=0.36, output_rms=2.0)
    rms = move.flatten(1).square().mean(1).sqrt().view(2, 1, 1, 1)
    torch.testing.assert_close(step, 0.5 * 0.0015 * 2 * 0.8 / rms * move)
    with pytest.raises(ValueError, match="alpha_bar"):
        guided(form="gradient").step(move)


def test_references_are_drawn_by_seed_and_in_order():
    labels = torch.arange(2).repeat_interleave(50)
    first, other = pick_reference(labels, 10, 0), pick_reference(labels, 10, 1)
    assert torch.equal(first, pick_reference(labels, 10, 0))
    assert not torch.equal(first, other)
    assert torch.bincount(labels[first]).tolist() == [10, 10]
    assert (first.diff() > 0).all()
    assert torch.rand(1, generator=rng(0, "a")) != torch.rand(1, generator=rng(0, "b"))


def test_refusals():
    labels = torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match="set_reference"):
        OTGuidance()(latents(labels), 0, labels)
    guidance = guided()
    with pytest.raises(ValueError, match=r"classes \[5\] have no reference"):
        guidance(latents(labels), 0, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="the reference has"):
        guidance(torch.randn(2, 1, 5, 5), 0, labels)
    with pytest.raises(ValueError, match="NaN or infinity"):
        guidance(torch.full((2, 1, 4, 4), torch.nan), 0, labels)
    with pytest.raises(ValueError, match="class_labels must be a tensor, got list"):
        guidance.set_reference(torch.zeros(2, 3), [0, 1])
    with pytest.raises(ValueError, match="class_labels must be int64"):
        guidance(latents(labels), 0, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="latents must be a floating tensor"):
        guidance.set_reference(torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="class_labels must be a tensor, got list"):
        guidance.transport_cost(latents(labels), [0, 1])
    x, few = latents(labels), torch.zeros(1, 1, 4, 4)
    for memory, message in (
        (few, "memory: Tensor is not accepted; expected a pair"),
        ((few, labels), r"class_labels must be int64 of shape \(1,\)"),
        ((few * torch.nan, labels[:1]), "memory contains NaN"),
        ((torch.zeros(1, 1, 5, 5), labels[:1]), r"memory: .*\(1, 5, 5\) .* expected \(1, 4, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            guidance(x, 0, labels, memory=memory)
    with pytest.raises(ValueError, match=r"alpha_bar: 1\.5 is not accepted; expected 0 to 1"):
        guidance(x, 0, labels, alpha_bar=1.5)
    for rms in ("1", math.nan, -1.0, torch.ones(3), None):
        with pytest.raises(ValueError, match=r"output_rms: .* expected a number >= 0, or a tensor"):
            guidance(x, 0, labels, output_rms=rms)
    noised = guided(target="q_sample")
    with pytest.raises(ValueError, match=r"t: a tensor of \(2,\) is not accepted; expected one"):
        noised(x, torch.tensor([3, 3]), labels, alpha_bar=0.5)
    one = noised(x, torch.tensor([3]), labels, alpha_bar=0.5)
    assert torch.equal(one, noised(x, 3, labels, alpha_bar=0.5))
    with pytest.raises(ValueError, match="config: dict is not accepted; expected GuidanceConfig"):
        OTGuidance({"strength": 0.3})
    for lambda_1 in (0.0, 1e-8):  # at 1e-8 projections were off by 1e6
        with pytest.raises(ConfigError, match=r"lambda_1: .* expected a number >= 1e-5"):
            GuidanceConfig(lambda_1=lambda_1)
