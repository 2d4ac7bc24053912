"""Steps that the host would launch one by one: on a GPU most are replays of a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch

STEPS, LAUNCHES = 8, 256  # of a graph, at most; of a step with more launches it holds one
_own = threading.local()


def repeated(
    step: Callable[[int], None], times: int, launches: int, device: torch.device
) -> Iterator[int]:
    """Does ``step(0)``, ``step(1)``, ..., and yields how many are done after some of them.

    A step is some launches on memory that it was given: it allocates nothing, so that whoever
    calls may free it while the last replays are under way, and from its second time on it is always
    the same. The first two compile its kernels. In a capture of somebody else's there is no other.

    Args:
        step: Called with its number.
        times: Steps to do.
        launches: Of a step.
        device: Where they run.
    """
    size = max(1, min(STEPS, LAUNCHES // launches))
    done = 0
    while done < min(times, 2):
        step(done)
        done += 1
        yield done
    if times - done >= 2 * size and _can_capture(device):
        replay = _captured(step, size, device)
        while times - done >= size:
            replay()
            done += size
            yield done
    while done < times:
        step(done)
        done += 1
        yield done


def _can_capture(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _captured(step: Callable[[int], None], size: int, device: torch.device) -> Callable[[], None]:
    """What replays `size` steps, each as the third; a graph in use is freed when it has ended.

    `torch.cuda.graph` would wait for the device and collect garbage first. The stream belongs to
    the thread, as nothing else may be launched on it meanwhile; what other threads do, and what
    Python frees, is no error of a relaxed capture.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_stream(device)):
        graph.capture_begin(capture_error_mode="relaxed")
        try:
            for _ in range(size):
                step(2)
        finally:
            graph.capture_end()
    return graph.replay


def _stream(device: torch.device) -> torch.cuda.Stream:
    streams = _own.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]
