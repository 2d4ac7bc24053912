"""The adapter and the loop with U-Nets, Stable Diffusion's and PixArt, all tiny and random."""

import pytest
import torch
from distill.tiny import randomise, transformer

from otdd.distill import Denoiser, GuidanceConfig, Guides, OTGuidance, denoise
from otdd.distill.codec import import_diffusers
from otdd.distill.denoising import stepper

diffusers = import_diffusers()
CLASSES, SHAPE = 3, (4, 8, 8)
BLOCKS = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unet() -> Denoiser:
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_class_embeds=CLASSES + 1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, **BLOCKS,
    )  # fmt: skip
    return Denoiser(randomise(model), {"class_labels": torch.arange(CLASSES + 1)})


def stable_diffusion(extra: bool = False) -> Denoiser:
    settings = {"addition_embed_type": "text_time", "addition_time_embed_dim": 2,
                "projection_class_embeddings_input_dim": 4 + 6 * 2} if extra else {}  # fmt: skip
    model = diffusers.UNet2DConditionModel(
        sample_size=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=6,
        attention_head_dim=4, **BLOCKS, **settings,
    )  # fmt: skip
    conditions = {"encoder_hidden_states": random(CLASSES + 1, 5, 6)}
    if extra:  # as SDXL has
        ids = torch.tensor([[8, 8, 0, 0, 8, 8]] * (CLASSES + 1))
        conditions["added_cond_kwargs"] = {"text_embeds": random(CLASSES + 1, 4), "time_ids": ids}
    return Denoiser(randomise(model), conditions)


def pixart() -> Denoiser:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=8, sample_size=8, caption_channels=6, use_additional_conditions=False,
    )  # fmt: skip
    mask = torch.ones(CLASSES + 1, 5)
    mask[:, 3:] = 0
    conditions = {
        "encoder_hidden_states": random(CLASSES + 1, 5, 6),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {},
    }
    return Denoiser(randomise(model), conditions)


FAMILIES = {
    "dit": lambda: Denoiser(transformer(CLASSES, side=8)),
    "unet": unet,
    "sd": stable_diffusion,
    "sdxl": lambda: stable_diffusion(extra=True),
    "pixart": pixart,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_scale_and_batches(family):
    denoiser = FAMILIES[family]()
    assert denoiser.num_classes == CLASSES
    z, labels = random(3, *SHAPE), torch.tensor([0, 2, 0])
    with torch.no_grad():
        plain, rest = denoiser.predict(z, 400, labels)
        other, _ = denoiser.predict(z, 400, torch.tensor([1, 1, 1]))
        null, _ = denoiser.predict(z, 400, torch.full((3,), CLASSES))
        guided, same = denoiser.predict(z, torch.tensor(400), labels, 3.0, batch=2)
    assert plain.shape == z.shape
    assert (rest is not None) == (family == "pixart")
    assert not torch.allclose(plain, other, atol=1e-4)
    torch.testing.assert_close(guided, null + 3 * (plain - null), rtol=1e-3, atol=1e-4)
    if rest is not None:
        torch.testing.assert_close(same, rest, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", ["x0", "through"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_guided(family, target):
    denoiser, labels = FAMILIES[family](), torch.tensor([0, 2])
    guidance = OTGuidance(GuidanceConfig(target=target, form="gradient", strength=50.0))
    guidance.set_reference(random(30, *SHAPE), torch.arange(CLASSES).repeat_interleave(10))
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    made = [
        denoise(
            lambda z, t: denoiser.predict(z, t, labels, 2.0),
            scheduler,
            random(2, *SHAPE),
            guides,
            advance=stepper(scheduler, torch.Generator().manual_seed(0)),
        )
        for guides in (None, Guides([guidance], labels))
    ]
    assert all(torch.isfinite(x).all() for x in made)
    assert not any(x.requires_grad for x in made)  # no graph from step to step
    assert not torch.equal(*made)


def test_the_loop_of_a_user_gives_the_same():
    denoiser, labels = Denoiser(transformer(CLASSES, side=8)), torch.tensor([0, 1, 2])
    guidance = OTGuidance(GuidanceConfig())
    guidance.set_reference(random(30, *SHAPE), torch.arange(CLASSES).repeat_interleave(10))
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(5)
    x = random(3, *SHAPE)
    with torch.no_grad():
        ours = denoise(
            lambda z, t: denoiser.predict(z, t, labels), scheduler, x, Guides([guidance], labels)
        )
        for t in scheduler.timesteps:
            a = float(scheduler.alphas_cumprod[t])
            eps = denoiser.model(x, timestep=t.expand(3), class_labels=labels).sample
            x0 = guidance((x - (1 - a) ** 0.5 * eps) / a**0.5, t, labels)
            x = scheduler.step((x - a**0.5 * x0) / (1 - a) ** 0.5, t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_parts_are_computed_again_for_gradients_and_keep_nothing(family, scale):
    denoiser = FAMILIES[family]()
    z, labels, calls, kept = random(5, *SHAPE).requires_grad_(), torch.arange(5) % 3, [], []
    denoiser.model.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))

    def gradient(batch):
        kept.append(0)

        def pack(tensor):
            kept[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = denoiser.predict(z, 500, labels, scale, batch=batch)[0]
        return out, torch.autograd.grad(out.square().sum(), z)[0]

    (whole, want), (parts, seen) = gradient(None), gradient(2)
    copies = 1 if scale == 1.0 else 2
    assert calls[:4] == [copies * n for n in (5, 2, 2, 1)]
    assert len(calls) == 7  # each part once more
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(seen, want)
    assert kept[1] < 0.2 * kept[0]
    with torch.no_grad():
        denoiser.predict(z, 500, labels, scale, batch=2)
    assert len(calls) == 10


def test_through_is_the_gradient_by_z_and_terms_add_up():
    denoiser, labels = Denoiser(transformer(CLASSES, side=8)), torch.tensor([0, 1])
    terms = []
    for target in ("through", "z_t"):
        config = GuidanceConfig(target=target, form="gradient", strength=30.0, repulsion=0.0)
        terms.append(OTGuidance(config))
        terms[-1].set_reference(random(20, *SHAPE), torch.arange(2).repeat_interleave(10))
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(1)
    z, (t,) = random(2, *SHAPE), scheduler.timesteps
    made = {
        used: denoise(
            lambda z, t: denoiser.predict(z, t, labels), scheduler, z,
            Guides([terms[k] for k in used], labels),
        )
        for used in ((), (0,), (1,), (0, 1))
    }  # fmt: skip
    a = float(scheduler.alphas_cumprod[t])
    z.requires_grad_()
    eps = denoiser.predict(z, t, labels)[0]
    x0 = (z - (1 - a) ** 0.5 * eps) / a**0.5
    move = terms[0].direction(x0.detach(), t, labels)
    move = torch.autograd.grad((x0 * move).sum(), z)[0]
    rms = eps.detach().flatten(1).square().mean(1).sqrt()
    want = terms[0].step(move, alpha_bar=a, output_rms=rms)
    torch.testing.assert_close(made[()] - made[(0,)], want, rtol=1e-2, atol=1e-3)
    both = made[(0,)] + made[(1,)] - made[()]
    torch.testing.assert_close(made[(0, 1)], both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"a": torch.zeros(3, 2), "b": {"c": torch.zeros(2, 2)}}, r"'a': 3, 'b.c': 2"),
        ({"a": torch.zeros(1, 2)}, "one row per class and one for no class"),
        ({"a": 3}, "conditions: a is no tensor"),
        ({}, "conditions: tables of"),
        (torch.zeros(3, 2), "conditions: Tensor is not accepted; expected a mapping of tables"),
    ],
)
def test_tables_that_do_not_fit(conditions, message):
    with pytest.raises(ValueError, match=message):
        Denoiser(torch.nn.Linear(1, 1), conditions)


def test_refusals():
    model = unet().model
    with pytest.raises(ValueError, match="UNet2DModel has no class embeddings of a DiT"):
        Denoiser(model)
    free = Denoiser(model, {"class_labels": torch.arange(4)}, null=False)
    assert free.num_classes == 4
    with pytest.raises(ValueError, match=r"guidance_scale: 2\.0 needs a row for no class"):
        free.check(torch.tensor([3]), 2.0)
    with pytest.raises(ValueError, match="class_labels: 4 is not accepted; expected 0 to 3"):
        free.check(torch.tensor([4]), 1.0)
    labels, z = torch.tensor([0, 3]), random(2, *SHAPE)
    with pytest.raises(ValueError, match=r"guidance_scale: 2\.0 needs a row for no class"):
        free.predict(z, 1, labels, 2.0)
    with pytest.raises(ValueError, match="class_labels: 9 is not accepted; expected 0 to 3"):
        free.predict(z, 1, torch.tensor([0, 9]))
    with pytest.raises(ValueError, match=r"class_labels: shape \(1,\) is not .* \(2,\)"):
        free.predict(z, 1, labels[:1])
    with pytest.raises(ValueError, match="class_labels must be a tensor, got list"):
        free.predict(z, 1, [0, 3])
    for kind in (torch.bool, torch.float32):
        with pytest.raises(ValueError, match=f"class_labels: {kind} is not accepted; expected int"):
            free.predict(z, 1, labels.to(kind))
    for batch in (-1, 0, 1.5):
        with pytest.raises(
            ValueError, match=f"batch: {batch} is not accepted; expected an integer"
        ):
            free.predict(z, 1, labels, batch=batch)


def test_labels_of_bytes_are_rows():
    """Tensors of uint8 are masks to torch: these would have been rows 0, 1, 2 and 3."""
    denoiser, z = unet(), random(4, *SHAPE)
    labels = torch.tensor([1, 1, 2, 2])
    wanted = denoiser.predict(z, 1, labels)[0]
    assert len(denoiser.conditions["class_labels"]) == len(labels)
    assert torch.equal(denoiser.predict(z, 1, labels.to(torch.uint8))[0], wanted)


SCHEDULERS = ("PNDM", "DPMSolverMultistep", "EulerDiscrete", "DDIM")


@pytest.mark.parametrize("name", [f"{name}Scheduler" for name in SCHEDULERS])
def test_a_scheduler_is_used_again_after_set_timesteps(name):
    """PNDM went on from what it remembered, and others ended in an error of their own."""
    scheduler, x = getattr(diffusers, name)(), random(1, *SHAPE)
    predict = lambda z, t: (0.5 * z, None)  # noqa: E731
    scheduler.set_timesteps(4)
    first = denoise(predict, scheduler, x)
    if name == "DDIMScheduler":  # which remembers nothing
        assert torch.equal(denoise(predict, scheduler, x), first)
    else:
        with pytest.raises(ValueError, match=f"scheduler: {name} has made steps; call set_tim"):
            denoise(predict, scheduler, x)
    scheduler.set_timesteps(4)
    assert torch.equal(denoise(predict, scheduler, x), first)


def test_a_loop_of_ones_own_is_checked_before_any_work():
    labels, x = torch.tensor([0, 1]), random(2, *SHAPE)
    guidance = OTGuidance(GuidanceConfig(window=(0.5, 1.0)))
    with pytest.raises(ValueError, match="guidance: OTGuidance, which is no list, is not acc"):
        Guides(guidance, labels)
    with pytest.raises(ValueError, match="guidance: str is not accepted; expected Guidance"):
        Guides(["ot"], labels)
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(2)

    def work(*_):
        pytest.fail("work was done")

    with pytest.raises(RuntimeError, match="call set_reference first"):
        denoise(work, scheduler, x, Guides([guidance], labels))
    guidance.set_reference(random(4, *SHAPE), torch.tensor([0, 0, 1, 1]))
    with pytest.raises(ValueError, match=r"classes \[2\] have no reference"):
        denoise(work, scheduler, x, Guides([guidance], labels + 1))
    with pytest.raises(ValueError, match="class_labels must be a tensor, got list"):
        denoise(work, scheduler, x, Guides([guidance], [0, 1]))
    with pytest.raises(ValueError, match="guides: list is not accepted; expected Guides"):
        denoise(work, scheduler, x, [guidance])
    with pytest.raises(ValueError, match="memory: Tensor is not accepted; expected a pair"):
        denoise(work, scheduler, x, Guides([guidance], labels, x))
    euler = diffusers.EulerDiscreteScheduler()
    euler.set_timesteps(4)
    euler.timesteps = euler.timesteps[1:]
    with pytest.raises(ValueError, match="scheduler: 3 timesteps beside 5 sigmas are not accepted"):
        denoise(work, euler, x, Guides([guidance], labels))
    with pytest.raises(ValueError, match="on_step: it returned NoneType; expected latents"):
        denoise(lambda z, t: (z, None), scheduler, x, on_step=lambda *_: None)


@pytest.mark.parametrize("guided", [False, True])
def test_what_a_denoiser_of_ones_own_returns(guided):
    """A tensor of two images was taken for a prediction and its variances."""
    x, labels = random(2, *SHAPE), torch.tensor([0, 1])
    guidance = OTGuidance()
    guidance.set_reference(random(4, *SHAPE), torch.tensor([0, 0, 1, 1]))
    guides = Guides([guidance], labels) if guided else None
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="predict: it returned Tensor; expected a pair"):
        denoise(lambda z, t: z, scheduler, x, guides)
    with pytest.raises(ValueError, match=r"prediction of \(1, 4, 8, 8\); expected \(2, 4, 8, 8\)"):
        denoise(lambda z, t: (z[:1], None), scheduler, x, guides)
