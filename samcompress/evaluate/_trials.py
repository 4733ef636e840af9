"""The trials of a search in Optuna's storage: proposed, measured, told, and found again."""

from __future__ import annotations

import json
import os
import random
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from ..core.budget import Limit
from ..core.errors import ConfigError, SamCompressError
from ..core.history import step_dict
from ..core.pipeline import Pipeline
from ._chains import Bench, Refused, RefusedError, Row, kept_row, one_line
from ._domain import Choices, Domain
from .benchmark import _conditions as conditions
from .measures import measure
from .space import Space, build
from .study import excess, finite, is_gain, spent, static

NAME = "samcompress"
UNSIGNED = 60  # seconds after which a trial that nobody signed was left by a killed process
REPEATS = 60  # chains in a row that were known already, after which a space is taken for searched
STARTUP = 8  # combinations of few techniques, so that the sampler has something to learn from


class Trials:
    """One search, shared by all that use its storage.

    Args:
        bench: measures chains.
        space: what may be tried.
        budget: limits.
        objectives: names of measures.
        seed: of what is proposed.
        storage: an Optuna storage, its URL, or None for a journal beside the rows.

    Raises:
        ConfigError: if the storage holds a search of other conditions.
    """

    def __init__(
        self,
        bench: Bench,
        space: Space,
        budget: Sequence[Limit],
        objectives: tuple[str, ...],
        *,
        seed: int,
        storage: Any,
    ) -> None:
        self.bench, self.space, self.budget = bench, space, budget
        self.objectives, self.seed = objectives, seed
        self.left: list[Any] = []  # trials that a killed process was at
        self.worker = f"{socket.gethostname()}:{os.getpid()}"
        with _quiet() as optuna:
            self.optuna = optuna
            self.study = optuna.create_study(
                storage=_journal(bench) if storage is None else storage,
                study_name=NAME,
                directions=["maximize" if is_gain(name) else "minimize" for name in objectives],
                load_if_exists=True,
            )
            self._same_conditions()

    # --- beginning ---

    def _same_conditions(self) -> None:
        here = json.loads(json.dumps(self._conditions()))
        there = self.study.user_attrs.get("conditions")
        if there is None:
            self.study.set_user_attr("conditions", here)
            return
        differ = [k for k in here | there if here.get(k) != there.get(k)]
        if differ:
            shown = (
                f"{k}: {_short(there.get(k))} there, {_short(here.get(k))} here" for k in differ
            )
            raise ConfigError(
                "this search was begun under other conditions.",
                got="; ".join(list(shown)[:4]),
                expected="the same space, budget, objectives, seed, model, data and settings; "
                "for times, the same kind of machine",
                fix="give another out= or storage=",
            )

    def _conditions(self) -> Row:
        """What must not differ between those who share a search."""
        found = conditions(self.bench.doc)
        timed = any(not self._everywhere(name) for name in self.objectives)
        timed = timed or any(limit.quantity not in ("parameters", "macs") for limit in self.budget)
        machine = ("cpu", "gpus")  # of no matter for what is the same on every machine
        return {
            **{k: v for k, v in found.items() if timed or k not in machine},
            "model": self.bench.base["identity"],
            "calibration": self.bench.about_calibration(),
            "space": self.space.to_dict()["slots"],
            "budget": [str(limit) for limit in self.budget],
            "objectives": self.objectives,
            "seed": self.seed,
        }

    @staticmethod
    def _everywhere(objective: str) -> bool:
        return is_gain(objective) or objective in ("parameters", "gmacs", "size_mb")

    def resume(self, *, singles: int) -> None:
        """Take up what a killed process was at, and queue every technique by itself.

        Args:
            singles: at most so many of them.
        """
        running = self.optuna.trial.TrialState.RUNNING
        with _quiet():
            for trial in self.study.get_trials(deepcopy=False, states=(running,)):
                if self._gone(trial):
                    # The very trial goes on: a new one would come later, and change what follows.
                    self.left.append(self.optuna.trial.Trial(self.study, trial._trial_id))
            if not self.study.user_attrs.get("begun"):
                draw = random.Random(self.seed)
                few = [self.space.few(draw) for _ in range(STARTUP)]
                for decisions in [*list(self.space.singles())[:singles], *few]:
                    self._enqueue(decisions)
                self.study.set_user_attr("begun", True)

    def _enqueue(self, decisions: Row) -> None:
        self.study.enqueue_trial({k: _text(v) for k, v in decisions.items()})

    def _gone(self, trial: Any) -> bool:
        """Whether nobody is at a trial any more: this process itself begins anew."""
        worker = str(trial.user_attrs.get("worker", ""))
        host, _, pid = worker.rpartition(":")
        if not worker:  # killed, or not yet signed
            return bool(datetime.now() - trial.datetime_start > timedelta(seconds=UNSIGNED))
        if host != socket.gethostname() or worker == self.worker:
            return worker == self.worker
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except (OSError, ValueError):
            return False
        return False

    # --- one trial ---

    def one(self) -> bool:
        """Propose a chain, make it, measure it, tell; whether a row was won."""
        with _quiet():
            done = self._done()
            # It proposes the same after a kill as without, by how far the search is.
            seed = random.Random(f"{self.seed} {len(done)}").getrandbits(32)
            self.study.sampler = self.optuna.samplers.TPESampler(seed=seed, n_startup_trials=1)
            if done and done[-1].user_attrs["outcome"] == "repeated":
                self._enqueue(self.space.few(random.Random(seed)))
            trial = self.left.pop(0) if self.left else self.study.ask()
            trial.set_user_attr("worker", self.worker)
            plan = self.space.plan(lambda name, domain: _suggest(trial, name, domain))
        outcome, reason, values = "repeated", "", None
        steps = [{"type": kind, "params": params} for kind, params in plan]
        name, key = " + ".join(kind for kind, _ in plan), ""
        try:
            chain = build(plan) if plan else None
            key = self.bench.key(chain)
            if chain is not None and key not in {t.user_attrs.get("key") for t in done}:
                name, steps = self.bench.called(chain), [step_dict(step) for step in chain]
                values = self._measure(trial, chain, name)
                outcome = "measured"
        except RefusedError as err:
            outcome, reason = err.outcome, str(err)
        except SamCompressError as err:
            outcome, reason = "refused", one_line(err)
        attributes = {"key": key, "name": name, "steps": steps, "outcome": outcome}
        self._tell(trial, values, {**attributes, "reason": reason})
        return outcome == "measured"

    def _measure(self, trial: Any, chain: Pipeline, name: str) -> list[float]:
        """The objectives of a chain; marks on the trial how far it is beyond the budget."""
        row = self.bench.known(chain)
        if row is None:
            small = self.bench.make(chain)
            for limit in filter(static, self.budget):
                cost = limit.cost(small)
                beyond = excess(limit, cost, self.bench.base)
                if beyond > 0:
                    _mark(trial, limit, beyond)
                    raise RefusedError("over budget", f"{limit}: it has {limit.shown(cost)}")
            row = self.bench.measure(chain, small, name)
        if row["status"] != "measured":
            raise RefusedError("not measured", str(row["reason"]))
        found = [measure(objective, [row]).read(row)[0] for objective in self.objectives]
        costs = [spent(limit, row) for limit in self.budget]
        if not finite([*found, *costs]):
            gaps = (f"{k}: {v}" for k, v in (row.get("missing") or {}).items())
            raise RefusedError("not measured", "; ".join(gaps) or "an objective is missing")
        for limit, paid in zip(self.budget, costs, strict=True):
            _mark(trial, limit, excess(limit, float(paid or 0), self.bench.base))
        return [float(value) for value in found]

    def _tell(self, trial: Any, values: list[float] | None, attributes: Row) -> None:
        state = self.optuna.trial.TrialState
        with _quiet():
            for name, value in attributes.items():
                trial.set_user_attr(name, value)
            if values is not None:
                self.study.tell(trial, values, skip_if_finished=True)
            else:
                # The sampler keeps away from what was refused; what is known it learnt before.
                known = attributes["outcome"] == "repeated"
                told = state.FAIL if known else state.PRUNED
                self.study.tell(trial, state=told, skip_if_finished=True)

    # --- reading ---

    def _done(self) -> list[Any]:
        """Finished trials that came to an end of their own, in order."""
        trials = self.study.get_trials(deepcopy=False)
        return [t for t in trials if t.state.is_finished() and "outcome" in t.user_attrs]

    def measured(self) -> int:
        """Chains that have a row."""
        return sum(t.user_attrs["outcome"] == "measured" for t in self._done())

    def running(self) -> int:
        """Chains that others are at."""
        running = self.optuna.trial.TrialState.RUNNING
        return len(self.study.get_trials(deepcopy=False, states=(running,)))

    def exhausted(self) -> bool:
        """Whether only known chains were proposed for long."""
        last = [t.user_attrs["outcome"] for t in self._done()[-REPEATS:]]
        return last.count("repeated") == REPEATS

    def counts(self) -> dict[str, int]:
        """Trials by what became of them."""
        outcomes = [t.user_attrs["outcome"] for t in self._done()]
        return {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}

    def found(self) -> tuple[list[Row], list[Refused], int]:
        """Rows, chains that are not in the running, and how many rows lie on other machines."""
        rows, refused, elsewhere = [], [], 0
        for trial in self._done():
            about = trial.user_attrs
            made = (about["name"], tuple(about["steps"]))
            if about["outcome"] in ("refused", "failed", "over budget", "not measured"):
                refused.append(Refused(*made, about["outcome"], about["reason"]))
            if about["outcome"] != "measured":
                continue
            row = kept_row(self.bench.folder, about["key"], self.bench.base)
            if row is None:
                elsewhere += 1
                continue
            rows.append({**row, "name": about["name"]})
            beyond = [k for k, v in trial.constraints.items() if v > 0]
            if beyond:
                refused.append(Refused(*made, "over budget", ", ".join(beyond)))
        return rows, refused, elsewhere


def _suggest(trial: Any, name: str, domain: Domain) -> Any:
    if isinstance(domain, Choices):
        texts = [_text(value) for value in domain.values]
        return domain.values[texts.index(trial.suggest_categorical(name, texts))]
    if domain.whole:
        step = 1 if domain.log else int(domain.step or 1)
        high = domain.grid()[-1]
        return trial.suggest_int(name, domain.low, high, step=step, log=domain.log)
    high = domain.grid()[-1] if domain.step else domain.high
    value = trial.suggest_float(name, domain.low, high, step=domain.step, log=domain.log)
    return round(value, 10)


def _mark(trial: Any, limit: Limit, beyond: float) -> None:
    """Note how far a trial is beyond a limit; one that goes on after a kill may have it already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*constraint value is ignored")
        trial.set_constraint(str(limit), beyond)


def _text(value: Any) -> Any:
    """A choice as storages keep it: numbers of ranges stay what they are."""
    return value if isinstance(value, (str, int, float)) else json.dumps(value)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _journal(bench: Bench) -> Any:
    """A journal beside the rows, which processes on several machines may write."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    bench.folder.mkdir(parents=True, exist_ok=True)
    file = (bench.folder / "trials.journal").resolve()
    # Who is killed while he holds the lock is waited for no longer than this.
    lock = JournalFileOpenLock(str(file), grace_period=10)
    if file.exists():
        lock.acquire()
        try:
            _mend(file)
        finally:
            lock.release()
    return JournalStorage(JournalFileBackend(str(file), lock_obj=lock))


def _mend(file: Any) -> None:
    """Cut off a line that was written in part: the next one would be joined to it."""
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with file.open("r+b") as journal:
            journal.truncate(whole)


@contextmanager
def _quiet() -> Iterator[Any]:
    """Optuna, which otherwise writes a line for every trial."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield optuna
    finally:
        optuna.logging.set_verbosity(before)
