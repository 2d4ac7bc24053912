"""What a run would do: everything is checked as before a run, then counted; nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from torch import Tensor

from otdd.distill import choice, costs
from otdd.distill.config import RunConfig
from otdd.distill.costs import Cost, duration
from otdd.distill.evaluate import Student, finished, wants_soft
from otdd.distill.labels import storage
from otdd.distill.prepare import SAMPLED, Prepared, prepare
from otdd.distill.relabel import MEASURED, Plan, architecture, shard_name, teacher_names
from otdd.distill.store import Store
from otdd.distill.students import make_network
from otdd.distill.surrogate_config import SurrogateConfig
from otdd.distill.update import judged_by_teachers
from otdd.distill.words import counted, sized


def preview(config: RunConfig, stages: tuple[str, ...]) -> list[str]:
    """Lines that say what the stages of a run would make, and what that takes of the disk.

    Args:
        config: settings of the run.
        stages: some of `otdd.distill.pipeline.STAGES`.

    Raises:
        ConfigError, DataError, GeneratorError, StoreError: what the run would refuse.
    """
    made = prepare(config, only_sample=stages == ("sample",))
    store, data = Store(config.out), made.data
    store.sums.verify()
    shape = "x".join(map(str, data.image_shape))
    sizes = f"{len(data.train)} training and {len(data.test)} test images of {shape}"
    held = [part.images for part in (data.train, data.test)]
    real = sum(images.nbytes for images in held if isinstance(images, Tensor))  # not streamed ones
    rows = [
        ("data", f"{data.name}: {data.num_classes} classes, {sizes}"),
        ("out", f"{config.out}: " + ("goes on" if store.path.exists() else "new folder")),
    ]
    if "sample" in stages:
        rows += [("sample", line) for line in _sampling(config, made, store)]
    if "relabel" in stages:
        rows.append(("relabel", _labelling(config, made, store)))
    if "train" in stages:
        rows.append(("train", _training(config, made)))
    spent = [(stage, *row) for stage in stages for row in _costs(config, made, store, stage)]
    rows += [("time", f"{stage} {what}: {cost}") for stage, what, cost in spent]
    total = sum(cost.count * cost.step for *_, cost in spent)
    if spent:
        rows.append(("time", f"{duration(total)} in all, on this machine as busy as it is now"))
    rows.append(("memory", _memory(real, bool(spent))))
    rows.append(("disk", f"about {sized(disk_bytes(config, made, stages))} in all"))
    return [f"{name:<9}{text}" for name, text in rows]


def _costs(
    config: RunConfig, made: Prepared, store: Store, stage: str
) -> Iterator[tuple[str, Cost]]:
    """What is still to be done in a stage, timed on a few steps of it."""
    count = config.ipc * made.data.num_classes
    early = judged_by_teachers(config) and not store.has_images("otg")  # trained before sampling
    if stage == "sample":
        if early:
            yield from _teaching(config, made, store)
        own = _own_surrogate(config)  # its networks would have to be trained first
        for name in config.sets:
            if name in SAMPLED and not store.has_images(name) and not (own and name == "otg"):
                steps = denoising_steps(config, made, name)
                if (cost := costs.denoising(config, made, name, steps)) is not None:
                    yield name, cost
    if stage == "relabel" and wants_soft(config) and not all(_labelled(config, made, store)):
        here, plan = _trained_here(config), _plan(config, made)
        batches = plan.labelled * plan.steps_per_epoch
        batches *= len(config.sets) * config.relabel.store_labels  # else students wait for them
        if not early:
            yield from _teaching(config, made, store)
        for arch in dict.fromkeys(here):
            if batches:
                label = costs.labelling(config, made, arch)
                yield f"labels of {arch}", Cost(batches * here.count(arch), label)
    if stage == "train":
        for arch in config.train.archs:
            for loss in config.train.losses:
                done = sum(
                    finished(store, Student(arch, loss, seed).file("results", name))
                    for name in config.sets
                    for seed in range(config.seeds)
                )
                left = (len(config.sets) * config.seeds - done) * Plan.of(
                    config, made.data, count
                ).total
                if left:
                    yield f"{arch}, {loss}", costs.training(config, made, arch, loss, left)


def _teaching(config: RunConfig, made: Prepared, store: Store) -> Iterator[tuple[str, Cost]]:
    here = _trained_here(config)
    for arch in dict.fromkeys(here):
        if not list(store.path.glob(f"teachers/{arch}-*")):
            taught = costs.teaching(config, made, arch)
            yield f"teachers {arch}", Cost(taught.count * here.count(arch), taught.step)


def _trained_here(config: RunConfig) -> list[str]:
    """Teachers of a run that are trained in it."""
    return [n for n in teacher_names(config) if "=" not in n and not n.startswith("timm:")]


def _memory(real: int, was_timed: bool) -> str:
    held = f"{sized(real)} of real images"
    if not was_timed:
        return held
    return f"about {sized(costs.peak_memory())} at the peak of the timed steps, {held}"


def denoising_steps(config: RunConfig, made: Prepared, name: str) -> int:
    """Denoising steps of a sampled set, as the progress counts them."""
    groups = -(-made.data.num_classes // config.sample.batch_classes)
    sequential = config.sample.order == "sequential"
    passes = (config.ipc if sequential else config.sample.starts) if name == "otg" else 1
    return groups * passes * config.sample.steps


def label_bytes(config: RunConfig, made: Prepared) -> int:
    """Size of the soft labels of one set, and of the augmentation they belong to."""
    plan, classes = _plan(config, made), made.data.num_classes
    return storage(plan.labels, config.ipc, classes, plan.labelled, plan.batch)


def disk_bytes(config: RunConfig, made: Prepared, stages: tuple[str, ...]) -> int:
    """What the stages would write, in bytes, pictures as large as their pixels."""
    count, total = config.ipc * made.data.num_classes, 0
    if "sample" in stages:
        latent = 4 * prod(made.generator.latent_shape) if made.generator is not None else 0
        for name in config.sets:
            total += count * (2 * prod(made.data.image_shape) + latent * (name in SAMPLED))
        if _own_surrogate(config):
            total += SurrogateConfig.checkpoints * _network_bytes(
                SurrogateConfig.arch, config, made
            )
    if "relabel" in stages and wants_soft(config) and config.relabel.store_labels:
        total += len(config.sets) * label_bytes(config, made)
    judged = "sample" in stages and judged_by_teachers(config)
    if ("relabel" in stages and wants_soft(config)) or judged:
        here = _trained_here(config)
        if not config.relabel.store_labels:  # the others are kept as well
            here = [architecture(name) for name in teacher_names(config)]
        total += sum(_network_bytes(arch, config, made) for arch in here)
    if "evaluate" in stages:  # the tables have the pictures once more
        total += len(config.sets) * count * prod(made.data.image_shape)
    return total


def _network_bytes(arch: str, config: RunConfig, made: Prepared) -> int:
    network = make_network(arch, made.data, config.seed)
    return sum(t.nbytes for t in network.state_dict().values())


def _own_surrogate(config: RunConfig) -> bool:
    """Whether influence guidance makes the run train its own networks."""
    influence = config.sample.influence
    return "otg" in config.sets and influence.strength > 0 and influence.surrogate is None


def _sampling(config: RunConfig, made: Prepared, store: Store) -> Iterator[str]:
    count = config.ipc * made.data.num_classes
    if _own_surrogate(config) and not store.has_images("otg"):
        own = SurrogateConfig
        yield f"surrogate: a {own.arch} trained for {own.epochs} epochs, once"
    if judged_by_teachers(config) and not store.has_images("otg"):
        starts, names = counted(config.sample.starts, "start"), ", ".join(teacher_names(config))
        yield f"teachers: {names}, who compare {starts} of otg"
    for name in config.sets:
        if store.has_images(name):
            yield f"{name}: finished"
        elif name in SAMPLED:
            yield f"{name}: {count} images, {denoising_steps(config, made, name)} denoising steps"
        else:
            yield f"{name}: {count} images, from the real ones"


def _labelling(config: RunConfig, made: Prepared, store: Store) -> str:
    if not wants_soft(config):
        return "nothing: no loss asks for soft labels"
    names, measured = teacher_names(config), MEASURED in config.relabel.teachers
    count = "1 to " * (measured and len(names) > 1) + counted(len(names), "teacher")
    count += f" ({', '.join(names)})"
    if not config.relabel.store_labels:
        done = ": finished" if choice.kept(store) else ""
        return f"{count}, kept in place of labels; they label while students train{done}"
    plan = _plan(config, made)
    parts = _labelled(config, made, store)
    done = f", {sum(parts)} of {counted(len(parts), 'shard')} finished" if any(parts) else ""
    return (
        f"{counted(len(config.sets), 'set')} by {count}, "
        f"{counted(plan.labelled, 'epoch')} of {counted(plan.steps_per_epoch, 'batch', 'batches')} "
        f"of {plan.batch}: "
        f"{sized(label_bytes(config, made))} a set{done}"
    )


def _labelled(config: RunConfig, made: Prepared, store: Store) -> list[bool]:
    """Which shards of labels are there, or whether the teachers are where none are stored."""
    if not config.relabel.store_labels:
        return [bool(choice.kept(store))]
    plan = _plan(config, made)
    shards = -(-plan.labelled // plan.epochs_per_shard(made.data.num_classes))
    return [store.has(shard_name(name, i)) for name in config.sets for i in range(shards)]


def _training(config: RunConfig, made: Prepared) -> str:
    train = config.train
    students = len(config.sets) * len(train.archs) * len(train.losses) * config.seeds
    return (
        f"{counted(students, 'student')} ({counted(len(config.sets), 'set')}, "
        f"{', '.join(train.archs)}; {', '.join(train.losses)}; {counted(config.seeds, 'seed')}) "
        f"of {counted(_plan(config, made).total, 'step')}"
    )


def _plan(config: RunConfig, made: Prepared) -> Plan:
    return Plan.of(config, made.data, config.ipc * made.data.num_classes)
