"""Measures settings on a real server: applies them, loads it, summarises. Importing this applies gevent's patches."""

from __future__ import annotations

from statistics import fmean

from msgspec.structs import replace

from llamaherd_loadtest.arrivals import Arrivals
from llamaherd_loadtest.client import ChatClient, clock
from llamaherd_loadtest.drive import WARM_UP_S, NotWarmedUp, Run, RunFailed, at_once, closed_loop, open_loop
from llamaherd_loadtest.limits import judge_errors, observe
from llamaherd_loadtest.probe import ServerUnusable, calibrate
from llamaherd_loadtest.quantiles import Judgement
from llamaherd_loadtest.rng import fresh_seed
from llamaherd_loadtest.samples import CUT_OFF, OK, Sample, write_samples
from llamaherd_loadtest.summary import counted, in_words, summarise
from llamaherd_loadtest.tune.applier import Applier, Refused
from llamaherd_loadtest.tune.evidence import SLOTS, EngineSample, Load, Measurement
from llamaherd_loadtest.tune.options import Options
from llamaherd_loadtest.tune.pace import Calibrated
from llamaherd_loadtest.tune.settings import Settings
from llamaherd_loadtest.workload import Prompts

_WARM_UP = 0.2  # of an open loop's window
_MIN_ARRIVALS = 8


class LiveBench:
    """Measures windows on a server. By default each slot has one client, so that no request waits for a slot."""

    def __init__(self, options: Options, applier: Applier, seed: int) -> None:
        """Raises ServerUnusable if requests are not answered."""
        self._target, self._client, self._applier = options.target, ChatClient(options.target), applier
        self._workload, self._limits, self._objective = options.workload, options.limits, options.objective
        # If a search is resumed, or repeated with its seed, the server's cache must not hold its prompts.
        self._fresh = fresh_seed() << 64
        self.calibration = calibrate(self._client, options.target, self._fresh + seed)
        self._samples_dir = options.out / "samples"
        self._samples_dir.mkdir(parents=True, exist_ok=True)

    def calibrated(self, concurrency: int, seed: int, within_s: float) -> Calibrated:
        """Measure how long a request takes with `concurrency` in flight, from what arrives within `within_s` seconds.

        Raises ServerUnusable if requests fail.
        """
        started = clock()
        samples = at_once(self._client, self._prompts(seed), concurrency=concurrency, within_s=within_s)
        running = [sample for sample in samples if sample.outcome in (OK, CUT_OFF)]
        progressed = [sample for sample in running if sample.outcome == OK or sample.gaps]
        times = [self._whole_s(sample) for sample in progressed or running]
        if not times:
            raise ServerUnusable(
                f"{self._target.url} answers none of {concurrency} requests: {samples[0].outcome}: {samples[0].detail}"
            )
        return Calibrated(concurrency, fmean(times), clock() - started)

    def _whole_s(self, sample: Sample) -> float:
        """Return the duration of a whole request; one that was cut off is extrapolated from its progress."""
        if sample.outcome == OK:
            return sample.e2e
        tokens = self._workload.output.median
        if sample.ttft is not None and sample.gaps:
            return max(sample.e2e, sample.ttft + fmean(sample.gaps) * (tokens - 1))
        return sample.e2e * tokens

    def measure(self, settings: Settings, window_s: float, seed: int, load: Load = SLOTS) -> Measurement:
        """Measure one window. If the server refuses the settings, or crashes with them, that is their fault.

        Raises ServerUnusable if the server does not come back, or if its settings were changed meanwhile.
        """
        started = clock()
        try:
            self._applier.apply(settings)
            measurement = self._load(load, int(settings["parallel"]), window_s, seed)
            self._applier.check(settings)
        except Refused as failure:
            measurement = self._fault(f"not launched: {failure}", does_not_fit=failure.does_not_fit)
        except NotWarmedUp as failure:
            measurement = self._fault(f"invalid: {failure}")
            measurement.request_s = failure.waited_s
        except RunFailed as failure:
            measurement = self._fault(f"failed: {failure}")
        measurement.took_s = clock() - started
        return measurement

    def _fault(self, why: str, *, does_not_fit: bool = False) -> Measurement:
        self._applier.wait_ready()
        return Measurement(took_s=0.0, fault=why, does_not_fit=does_not_fit)

    def _load(self, load: Load, slots: int, window_s: float, seed: int) -> Measurement:
        concurrency = load.concurrency or slots
        prompts, watch = self._prompts(seed), self._applier.watch()
        try:
            if load.rate:
                run = self._arrivals(load.rate, prompts, window_s, seed)
            else:
                run = closed_loop(
                    self._target,
                    self._client,
                    prompts,
                    concurrency=concurrency,
                    window_s=window_s,
                    warm_up_s=WARM_UP_S + 2 * window_s,
                    rounds=1,
                )
        finally:
            engine = watch.stop()
        write_samples(self._samples_dir / f"{seed}.jsonl", run.samples)
        measurement = self._sum_up(run, engine)
        measurement.concurrency = 0 if load.rate else concurrency
        return measurement

    def _prompts(self, seed: int) -> Prompts:
        return Prompts(self._workload, model=self._target.model, seed=self._fresh + seed, calibration=self.calibration)

    def _arrivals(self, rate: float, prompts: Prompts, window_s: float, seed: int) -> Run:
        """Run an open loop: warm-up is a fifth of the window; requests in flight at its end get one more window."""
        warm_up_s = window_s * _WARM_UP
        total = max(_MIN_ARRIVALS, round(rate * (window_s + warm_up_s)))
        offsets = Arrivals("poisson", rate, seed).offsets()
        return open_loop(self._client, prompts, offsets, total=total, warm_up_s=warm_up_s, drain_s=window_s)

    def _sum_up(self, run: Run, engine: list[EngineSample]) -> Measurement:
        inside = counted(run.samples, run.start, run.end)
        ok = [s for s in inside if s.outcome == OK]
        errors = len(inside) - len(ok)
        # Failed requests say something about the settings, even if they leave the load too low: whether they are too
        # many is judged over all windows.
        health = replace(run.health, concurrency=1.0) if errors else run.health
        summary = summarise(run.samples, run.start, run.end, health, self._limits)
        too_many = judge_errors(errors, len(inside)) is Judgement.MISSES
        wanted = [*self._limits, *([self._objective.limit] if self._objective.limit else [])]
        observed = {limit.name: observe(limit, inside, unbiased=True) for limit in wanted}
        fault = f"invalid: {summary.fault}" if summary.fault and not too_many else ""
        if not ok:
            fault = f"invalid: no request ended within the window of {summary.window_s:.0f} s"
        if not ok and errors:
            fault = f"failed: no request was answered: {in_words(summary)[0]}"
        return Measurement(
            took_s=0.0,
            fault=fault,
            score=self._objective.score(
                summary.output_tokens_per_s, summary.requests_per_s, observed.get(self._objective.name)
            ),
            tokens_per_s=summary.output_tokens_per_s,
            requests_per_s=summary.requests_per_s,
            requests=summary.requests,
            errors=errors,
            observed={name: value for name, value in observed.items() if value is not None},
            over={judged.limit.name: (judged.over, judged.of) for judged in summary.judged},
            ttft_ms=[s.ttft * 1000 for s in ok if s.ttft is not None],
            tpot_ms=[s.tpot * 1000 for s in ok if s.tpot is not None],
            stalls=[(round(s.end - run.start, 2), s.largest_gap * 1000) for s in ok if s.largest_gap is not None],
            engine=engine,
            client_cpu=run.health.cpu,
            client_lag_ms=run.health.lag_p95_s * 1000,
            request_s=fmean(s.e2e for s in ok) if ok else summary.window_s,
        )
