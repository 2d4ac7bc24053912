"""`OTDiTPipeline`: bit for bit DiTPipeline without guidance, and what it adds to it."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from distill.surroundings import SURROUNDINGS
from distill.tiny import dit_pipeline

from otdd.distill import (
    DiversityConfig,
    DiversityGuidance,
    GuidanceConfig,
    OTDiTPipeline,
    OTGuidance,
    denoise,
)
from otdd.distill.codec import import_diffusers

diffusers = import_diffusers()

LABELS = [2, 0, 2]
PLAIN = {"clip_sample": False}
UNIT = {  # schedulers whose latents are unit Gaussian at the start: DiTPipeline is right there
    "ddim": (diffusers.DDIMScheduler, PLAIN),
    "ddim clipped": (diffusers.DDIMScheduler, {"clip_sample": True}),
    "ddim parallel": (diffusers.DDIMParallelScheduler, PLAIN),
    "ddpm": (diffusers.DDPMScheduler, PLAIN),
    "ddpm parallel": (diffusers.DDPMParallelScheduler, PLAIN),
    "dpm++": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpm++ singlestep": (diffusers.DPMSolverSinglestepScheduler, {}),
    "sde-dpm++": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
}
EULER = {
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
}
SCHEDULERS = UNIT | EULER
KINDS = ("epsilon", "v_prediction", "sample")


def pipe(name="ddim", kind="epsilon", classes=3, learned=False) -> OTDiTPipeline:
    made = OTDiTPipeline.from_pipe(dit_pipeline(classes, learned))
    cls, settings = SCHEDULERS[name]
    made.scheduler = cls(prediction_type=kind, **settings)
    made.set_progress_bar_config(disable=True)
    return made


def run(made, scale=1.0, steps=5, seed=0, **kwargs):
    torch.manual_seed(seed + 100)  # the noise of the steps
    generator = torch.Generator().manual_seed(seed)
    kwargs = {"output_type": "latent"} | kwargs
    return made(LABELS, scale, generator, steps, **kwargs).images


def ot(shape=(4, 4, 4), classes=3, **settings) -> OTGuidance:
    guidance = OTGuidance(GuidanceConfig(**{"reference_size": 8, **settings}))
    rows = torch.randn(classes * 8, *shape, generator=torch.Generator().manual_seed(5))
    guidance.set_reference(rows, torch.arange(classes).repeat_interleave(8))
    return guidance


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", UNIT)
def test_without_guidance_bit_for_bit_the_original(name, scale, learned):
    # Its null class is 1000, so only a model of 1000 classes can be guided by it.
    ours = pipe(name, classes=1000 if scale > 1 else 3, learned=learned)
    original = diffusers.DiTPipeline(ours.transformer, ours.vae, ours.scheduler)
    original.set_progress_bar_config(disable=True)
    for output in ("pt", "np"):
        want, got = (run(p, scale, output_type=output) for p in (original, ours))
        assert type(want) is type(got)
        assert (want == got).all()
    assert (run(ours, scale, seed=1, output_type="np") != got).any()


def test_half_precision_and_pictures_are_those_of_the_original():
    ours = pipe().to(torch.bfloat16)
    original = diffusers.DiTPipeline(ours.transformer, ours.vae, ours.scheduler)
    original.set_progress_bar_config(disable=True)
    want, got = (run(p, output_type="pil") for p in (original, ours))
    assert [w.tobytes() for w in want] == [g.tobytes() for g in got]
    assert run(ours, guidance=ot()).dtype == torch.bfloat16


class Still(OTGuidance):
    """Sees everything, moves nothing."""

    def direction(self, x, *args, **kwargs):
        self.seen = [*getattr(self, "seen", []), x]
        return 0 * x


# Not here: an x0_hat that DDIM clips keeps its noise, a corrected one gets that of its own.
STILL = [(n, k) for n in SCHEDULERS for k in KINDS if n != "ddim clipped"]
STILL.remove(("ancestral", "sample"))  # diffusers has not got this one


@pytest.mark.parametrize(("name", "kind"), STILL)
def test_a_correction_of_nothing_changes_nothing(name, kind):
    made = pipe(name, kind)
    still = Still(GuidanceConfig(target="x0", reference_size=8))
    reference = ot()
    still.__dict__.update({k: v for k, v in reference.__dict__.items() if k != "config"})
    torch.testing.assert_close(run(made, guidance=still), run(made), rtol=2e-3, atol=2e-3)
    final = run(made, steps=20, guidance=still)  # and x0_hat is the image at the last step
    if name not in ("ancestral", "sde-dpm++"):
        torch.testing.assert_close(still.seen[-1], final, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("target", ["z_t", "q_sample", "x0", "through"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_guidance_lowers_the_transport_cost(name, target):
    made = pipe(name, learned=True)
    form = "gradient" if target == "through" else "projection"
    guidance = ot(target=target, strength=0.2, repulsion=0.0, detail=0.0, form=form)
    labels = torch.tensor(LABELS)
    free, guided = run(made, 1.5), run(made, 1.5, guidance=[guidance])
    cost = [guidance.transport_cost(x, labels).mean() for x in (free, guided)]
    assert torch.isfinite(guided).all()
    assert not torch.equal(guided, free)
    if target != "through":  # whose way through random weights leads anywhere
        assert cost[1] < cost[0]


@pytest.mark.parametrize("target", ["z_t", "x0", "through"])
def test_half_precision_is_guided_to_about_the_same(target):
    guidance = ot(target=target, form="gradient", strength=5.0)
    made = [
        run(pipe().to(dtype), 1.5, guidance=guidance) for dtype in (torch.float32, torch.bfloat16)
    ]
    assert made[1].dtype == torch.bfloat16
    torch.testing.assert_close(made[0], made[1].float(), rtol=0.1, atol=0.1)


def test_the_term_of_the_documentation():
    page = (Path(__file__).parents[2] / "docs/how-to/generator.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (code,) = [block for block in blocks if "class Calm" in block]
    names = {}
    exec(code, names)
    made = pipe()
    free, calm = run(made), run(made, guidance=[ot(), names["Calm"]()])
    assert calm.var((2, 3)).mean() < run(made, guidance=ot()).var((2, 3)).mean()
    assert not torch.equal(free, calm)
    with pytest.raises(ValueError, match="expected \\(C, H, W\\)"):
        names["Calm"]().check(torch.tensor(LABELS), (4,))


@pytest.mark.parametrize("target", ["z_t", "x0", "through"])
@pytest.mark.parametrize("name", ["inference_mode", "float64"])
def test_it_is_called_as_other_pipelines_are(name, target):
    """Under `torch.inference_mode` as the documentation of diffusers has it."""
    made, guidance = pipe(), ot(target=target, form="gradient", strength=5.0)
    wanted = run(made, guidance=guidance)
    with SURROUNDINGS[name]():
        assert torch.equal(run(made, guidance=guidance), wanted)


def test_finished_latents_of_earlier_calls_are_looked_at():
    made = pipe()
    guidance = DiversityGuidance(DiversityConfig(strength=5.0))
    free, first = run(made), made([1], 1.0, output_type="latent").images
    lonely = run(made, guidance=guidance, memory=(first, torch.tensor([1])))
    assert torch.equal(lonely[1], free[1])  # the others of [2, 0, 2] see each other
    beside = run(made, guidance=guidance, memory=(first, torch.tensor([0])))
    assert not torch.equal(beside[1], free[1])
    torch.testing.assert_close(beside[[0, 2]], lonely[[0, 2]])


def test_the_null_class_is_the_one_after_the_last():
    made = pipe(classes=3)
    seen = []
    made.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    run(made, 2.0, steps=1)
    assert seen == [[2, 0, 2, 3, 3, 3]]


@pytest.mark.parametrize("target", ["x0", "through"])
def test_the_denoiser_runs_once_a_step_and_weights_get_no_gradients(target):
    made = pipe()
    calls = []
    made.transformer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    window = GuidanceConfig(target=target, window=(0.4, 0.8), reference_size=8)
    guidance = ot()
    guidance.config = window
    run(made, 2.0, steps=5, guidance=[guidance, guidance])
    assert calls == [k in (2, 3) and target == "through" for k in range(5)]
    assert all(p.requires_grad and p.grad is None for p in made.transformer.parameters())


@pytest.mark.parametrize("name", ["ddpm", "ddpm parallel"])
def test_learned_variances_reach_a_scheduler_that_takes_them(name):
    made = pipe(name, learned=True)
    fixed = run(made)
    made.scheduler = SCHEDULERS[name][0](variance_type="learned_range", clip_sample=False)
    assert not torch.equal(run(made), fixed)


def test_callbacks_see_and_change_the_latents():
    made, seen = pipe(), []

    def callback(pipeline, step, t, tensors):
        seen.append((step, int(t), tensors["latents"].clone()))
        if step == 3:
            pipeline._interrupt = True
        return {"latents": 0.5 * tensors["latents"]} if step == 1 else tensors

    stopped = run(made, callback_on_step_end=callback)
    assert [s for s, _, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(stopped, seen[3][2])
    assert not torch.equal(run(made), stopped)
    assert made.interrupt is False


def test_files_round_trip_with_names(tmp_path):
    dit_pipeline(id2label={0: "ant, emmet", 1: "bee", 2: "cat"}).save_pretrained(tmp_path / "a")
    ours = OTDiTPipeline.from_pretrained(tmp_path / "a", id2label={0: "ant, emmet", 1: "bee"})
    assert ours.get_label_ids(["emmet", "bee"]) == [0, 1]
    ours.save_pretrained(tmp_path / "b")
    again = OTDiTPipeline.from_pretrained(tmp_path / "b")
    assert again.labels == ours.labels
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run(again), run(pipe()))
    assert OTDiTPipeline.from_pipe(again).labels == ours.labels
    for known in (diffusers.DiTPipeline, diffusers.DiffusionPipeline):
        theirs = known.from_pretrained(tmp_path / "b")
        assert type(theirs) is diffusers.DiTPipeline
        assert theirs.labels == ours.labels


def test_from_another_pipeline_with_its_names_and_types(tmp_path):
    theirs = dit_pipeline(id2label={0: "ant, emmet", 1: "bee", 2: "cat"}).to(torch.bfloat16)
    theirs.vae.to(torch.float32)
    ours = OTDiTPipeline.from_pipe(theirs)
    assert ours.transformer is theirs.transformer
    assert (theirs.transformer.dtype, theirs.vae.dtype) == (torch.bfloat16, torch.float32)
    ours.save_pretrained(tmp_path)
    assert OTDiTPipeline.from_pretrained(tmp_path).labels == theirs.labels
    scheduler = diffusers.EulerDiscreteScheduler()
    other = OTDiTPipeline.from_pipe(ours, scheduler=scheduler, torch_dtype=torch.float16)
    assert (other.scheduler, other.labels) == (scheduler, theirs.labels)
    assert (other.transformer.dtype, other.vae.dtype) == (torch.float16, torch.float16)
    with pytest.raises(ValueError, match="pipeline: str is not accepted; expected a DiTPipeline"):
        OTDiTPipeline.from_pipe("folder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [3]}, "class_labels: 3 is not accepted; expected 0 to 2"),
        ({"class_labels": [0.5]}, "class_labels: .* expected integers"),
        (
            {"class_labels": ["bee"]},
            r"class_labels: \['bee'\] is not .* get_label_ids has for names",
        ),
        ({"class_labels": [True]}, r"class_labels: \[True\] is not accepted; expected integers"),
        ({"guidance_scale": "4"}, "guidance_scale: '4' is not accepted; expected a number"),
        ({"guidance_scale": float("nan")}, "guidance_scale: nan is not accepted"),
        ({"generator": 5}, "generator: 5 is not accepted; expected a torch.Generator"),
        ({"generator": [torch.Generator()] * 2}, "generator: 2 are not accepted; expected 1 or 3"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer >= 1, got 0"),
        ({"output_type": "jpg"}, "output_type 'jpg'; accepted: pil, np, pt, latent"),
        ({"guidance": [3]}, "guidance: int is not accepted"),
        ({"guidance": ot(shape=(4, 8, 8))}, "the reference has"),
        ({"guidance": ot(classes=2)}, r"classes \[2\] have no reference"),
        (
            {"memory": (torch.zeros(1, 4, 8, 8), torch.tensor([0]))},
            r"memory: latents of \(4, 8, 8\) are not accepted; expected \(4, 4, 4\)",
        ),
        ({"memory": (torch.zeros(1, 4, 4, 4), torch.tensor([0, 1]))}, "class_labels must be int64"),
        ({"memory": torch.zeros(1, 4, 4, 4)}, "memory: Tensor is not accepted; expected a pair"),
        ({"callback_on_step_end_tensor_inputs": ["prompt"]}, "'prompt' is not accepted; known"),
    ],
)
def test_refusals_before_any_work(arguments, message):
    made = pipe()
    made.transformer.register_forward_pre_hook(lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        made(**{"class_labels": LABELS, **arguments})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(3, 4, 4, 4), "it returned Tensor; expected a dict or None"),
        (
            {"latents": torch.zeros(1, 4, 4, 4)},
            r"latents of \(1, 4, 4, 4\); expected \(3, 4, 4, 4\)",
        ),
        ({"latents": None}, "latents of NoneType"),
    ],
)
def test_callbacks_that_return_something_else(returned, message):
    with pytest.raises(ValueError, match=f"callback_on_step_end: .*{message}"):
        run(pipe(), callback_on_step_end=lambda *_: returned)


def test_latents_of_a_callback_keep_the_type_of_the_model():
    made = pipe().to(torch.bfloat16)
    images = run(
        made, output_type="np", callback_on_step_end=lambda *a: {"latents": a[3]["latents"].float()}
    )
    assert images.shape == (3, 8, 8, 3)


def test_integers_of_any_kind_and_memory_without_latents():
    made, want = pipe(), run(pipe(), guidance=ot())
    nothing = torch.zeros(0, 4, 4, 4), torch.zeros(0, dtype=torch.int64)
    for labels in (np.array(LABELS, dtype=np.int32), torch.tensor(LABELS, dtype=torch.uint8)):
        generator = torch.Generator().manual_seed(0)
        got = made(
            labels, np.float32(1), generator, np.int64(5), "latent", guidance=ot(), memory=nothing
        )
        assert torch.equal(got.images, want)


def test_clipped_by_thresholds_x0_is_not_clipped_beside():
    made = pipe()
    made.scheduler = diffusers.DDPMScheduler(thresholding=True, sample_max_value=50.0)
    still = Still(GuidanceConfig(target="x0", reference_size=8))
    still.__dict__.update({k: v for k, v in ot().__dict__.items() if k != "config"})
    run(made, guidance=still)
    assert max(x0.abs().max() for x0 in still.seen) > 1


def test_a_term_of_no_strength_needs_no_reference():
    assert torch.equal(run(pipe(), guidance=OTGuidance(GuidanceConfig(strength=0.0))), run(pipe()))


def test_gradient_checkpointing_is_for_frozen_weights():
    made, through = pipe(), ot(target="through", form="gradient", strength=5.0)
    wanted = run(made, guidance=through)
    made.transformer.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="model: gradient checkpointing of weights that take grad"):
        run(made, guidance=through)
    made.transformer.requires_grad_(False)
    torch.testing.assert_close(run(made, guidance=through), wanted)


def test_schedulers_that_cannot_be_guided():
    made = pipe()
    made.scheduler = diffusers.HeunDiscreteScheduler()
    with pytest.raises(ValueError, match="guidance cannot use HeunDiscreteScheduler; accepted"):
        run(made, guidance=ot())
    made.scheduler = diffusers.DPMSolverMultistepScheduler(variance_type="learned_range")
    with pytest.raises(ValueError, match=r"variance_type 'learned_range' keeps three channels"):
        run(made)
    made.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler does not say how large"):
        run(made)
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for kind in (diffusers.DDIMScheduler, diffusers.DDPMScheduler):
        made.scheduler = kind(**settings)
        with pytest.raises(ValueError, match="rescale_betas_zero_snr with prediction_type 'epsil"):
            run(made, guidance=ot())
        made.scheduler = kind(**settings, prediction_type="v_prediction")
        assert torch.isfinite(run(made, guidance=ot())).all()


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        diffusers.EulerAncestralDiscreteScheduler,
        diffusers.KDPM2AncestralDiscreteScheduler,
        diffusers.KDPM2DiscreteScheduler,
        diffusers.PNDMScheduler,
    ],
)
def test_predictions_that_a_scheduler_has_not_got_are_refused_before_any_work(kind, guided):
    made = pipe()
    made.scheduler = kind(prediction_type="sample")
    made.transformer.register_forward_pre_hook(lambda *_: pytest.fail("work was done"))
    refusal = f"scheduler: {kind.__name__} has no prediction_type 'sample'; accepted: epsilon, v_p"
    with pytest.raises(ValueError, match=refusal):
        run(made, guidance=ot() if guided else None)
    made.scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=refusal):  # and in a loop of one's own
        denoise(lambda *_: pytest.fail("work was done"), made.scheduler, torch.randn(2, 4, 4, 4))


def test_importing_the_package_stays_light():
    code = "import sys, otdd.distill as d; assert 'OTDiTPipeline' in d.__all__\n"
    code += "assert set(d.__all__) <= set(dir(d))\n"  # which notebooks complete names by
    code += "assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
