"""Seconds, memory and errors of one call. A call is outputs and, if the case says so, gradients."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from op import Case, Inputs, Op, Outputs, Provider
from torch import Tensor

FLUSHED = 1 << 28  # bytes written before each iteration: five times the L2 of an H200
HELD = 1_500_000  # cycles, .8 ms: the launches of a call are queued before its clock starts
ENOUGH = 0.6  # seconds of a provider's iterations on a GPU, after which it has had its turns
WARM = {"cuda": 3, "cpu": 1}  # iterations that are not counted
FEW = 1000  # numbers: of fewer, luck decides whose rounding is smaller, and 5 times are allowed
# The rounding of a result to its dtype, relative; of fp32, that of some sums in another order.
LAST_PLACE = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 8e-3,
}

Work = Callable[[], Outputs]


def work_of(op: Op, case: Case, given: Inputs, provider: Provider) -> Work:
    """What is timed: the call, and the gradients of its first output."""
    return lambda: _run(op, case, given, provider.call)


def truth_of(op: Op, case: Case, given: Inputs) -> Outputs:
    """What is compared, in fp64."""
    if not case.backward:
        return op.judged(given, _run(op, case, given, op.exact))
    wide = dict(given)
    for name in op.leaves:
        wide[name] = given[name].detach().double().requires_grad_()
    return op.judged(wide, _run(op, case, wide, op.exact))


def _run(op: Op, case: Case, given: Inputs, call: Callable[[Inputs, Case], Outputs]) -> Outputs:
    if not case.backward:
        with torch.no_grad():
            return tuple(call(given, case))
    outputs = call(given, case)
    upstream = given.get("upstream", torch.ones_like(outputs[0], requires_grad=False))
    leaves = [given[name] for name in op.leaves]
    gradients = torch.autograd.grad(outputs[0], leaves, upstream.to(outputs[0].dtype))
    return *(output.detach() for output in outputs), *gradients


# -- errors --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Of the output or gradient that is nearest to, or furthest beyond, what is allowed."""

    error: float  # relative, in the 2-norm
    allowed: float
    match: bool


def errors_of(results: Outputs, truth: Outputs) -> list[float]:
    """|result - truth| / |truth| of each, in the 2-norm."""
    assert len(results) == len(truth), f"{len(results)} results, {len(truth)} are wanted"
    return [_error(result, true) for result, true in zip(results, truth, strict=True)]


def _error(result: Tensor, true: Tensor) -> float:
    assert result.shape == true.shape, f"{tuple(result.shape)}, not {tuple(true.shape)}"
    return float((result.double() - true).norm() / true.norm().clamp_min(1e-300))


def verdict(results: Outputs, truth: Outputs, plain: list[float] | None) -> Verdict:
    """Allowed is twice plain torch's error in the same dtype (see FEW), and the last place."""
    errors = errors_of(results, truth)
    pairs = []
    for error, result, base in zip(errors, results, plain or [0.0] * len(errors), strict=True):
        times = 5 if result.numel() < FEW else 2
        pairs.append((error, times * base + LAST_PLACE[result.dtype]))
    # NaN is beyond everything, and no comparison with it is true.
    worst = max(pairs, key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else torch.inf)
    return Verdict(*worst, match=all(error <= allowed for error, allowed in pairs))


def equal(first: Outputs, second: Outputs) -> bool:
    """To the bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -- memory --------------------------------------------------------------------------------------


def peak_mib(op: Op, case: Case, work: Work, device: torch.device) -> float:
    """MiB a call needs above its inputs, without the gradients that it leaves."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        _forget_peak()
        before, peak = host_peak(), host_peak
    results = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    gradients = results[len(results) - len(op.leaves) :] if case.backward else ()
    left = sum(gradient.nbytes for gradient in gradients)
    return max(0.0, (peak() - before - left) / 2**20)  # pages that were freed may be used again


def host_peak() -> int:
    """VmHWM in bytes: Linux's ru_maxrss begins with that of the process that started this one."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status tells no VmHWM")


def _forget_peak() -> None:
    """VmHWM begins again at what is resident now; a kernel that refuses leaves it as it is."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


# -- time ----------------------------------------------------------------------------------------


def clock(device: torch.device) -> Callable[[Work], float]:
    """A function that runs a call and tells its seconds."""
    if device.type != "cuda":
        return _host_seconds
    flushed = torch.empty(FLUSHED, dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def device_seconds(work: Work) -> float:
        torch.cuda._sleep(HELD)
        flushed.zero_()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return device_seconds


def _host_seconds(work: Work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turns(
    works: dict[str, Work], device: torch.device, rounds: int, over: Callable[[], bool]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each call, one after the other in every round, and those that failed."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    failed: dict[str, str] = {}
    tick = clock(device)
    for number in range(-WARM[device.type], rounds):
        if number > 0 and over():
            break
        for name, work in works.items():
            enough = device.type == "cuda" and sum(seconds[name]) >= ENOUGH
            if name in failed or enough:
                continue
            try:
                taken = tick(work)
            except Exception as error:  # of a peer, too: told in its row
                failed[name] = told(error)
                continue
            if number >= 0:
                seconds[name].append(taken)
    return seconds, failed


def told(error: Exception) -> str:
    """In one line; the error itself would keep the tensors of its frames alive."""
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def quantile_ms(seconds: list[float], q: float) -> float:
    """In milliseconds."""
    return 1e3 * float(torch.tensor(seconds, dtype=torch.float64).quantile(q))
