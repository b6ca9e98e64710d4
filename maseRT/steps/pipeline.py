"""Runs steps: decides from the records what is stale, runs it, and records it."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from maseRT.config import Config
from maseRT.data.files import data_files
from maseRT.errors import StepError, UsageError
from maseRT.factories import is_factory
from maseRT.hardware import cpu, nvidia_gpus, resolve_device
from maseRT.logs import log_file
from maseRT.progress import Reporter
from maseRT.records import (
    FileState,
    StepRecord,
    check_inputs,
    dependency_versions,
    flatten,
    read_record,
    sha256,
    source_hash,
    why_stale,
)
from maseRT.steps.gating import judged_again
from maseRT.steps.table import STEPS, Context, Step, StepResult, producers
from maseRT.user_code import code_files
from maseRT.workspace import DEFAULT_OUTPUT, Workspace, write_json

log = logging.getLogger(__name__)

Status = Literal["done", "cached", "would run"]

ENVIRONMENT = ("versions.", "maseRT.", "run.device", "run.threads", "machine.")
"""Key prefixes that describe the machine: another value there makes an input old, not wrong."""


@dataclass(frozen=True)
class Outcome:
    """What became of one step.

    Attributes:
        why: why it ran or would run; empty when cached.
        summary: the step's own plain values, also when cached.
    """

    step: str
    status: Status
    why: str
    seconds: float
    headline: str
    summary: dict[str, Any]
    outputs: tuple[Path, ...]
    table: Sequence[Sequence[str]] = ()
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Run:
    """One config on one output folder."""

    config: Config
    config_path: Path
    workspace: Workspace
    reporter: Reporter
    force: bool = False

    def transform(
        self, *, first: str | None = None, last: str | None = None, on_outcome: Callable[[Outcome], None] | None = None
    ) -> list[Outcome]:
        """Run the steps that the config has, in order, skipping what is done.

        Args:
            first: start at this step; what comes before is taken as it lies there.
            last: stop after this step.
            on_outcome: called after each step.
        """
        outcomes = []
        with self._held():
            for step in self._selected(first, last):
                outcomes.append(self._run(step))
                if on_outcome:
                    on_outcome(outcomes[-1])
        return outcomes

    def single(self, step: Step) -> Outcome:
        """Run one step from what the steps before it left on disk."""
        if not step.wanted(self.config):
            raise _not_wanted(step, self.config, self.config_path)
        with self._held():
            self._check_upstream(step)
            return self._run(step)

    def preview(self, *, first: str | None = None, last: str | None = None) -> list[Outcome]:
        """Return what `transform` would do, without doing it."""
        outcomes: list[Outcome] = []
        running = ""
        for step in self._selected(first, last):
            record = read_record(self.workspace, step.name)
            if running:
                why: str | None = f"{running} runs before it"
            elif self.force:
                why = "--force"
            else:
                why = self._why(step, record)
            running = running or (step.name if why else "")
            seconds = record.seconds if record else 0.0
            outcomes.append(Outcome(step.name, "would run" if why else "cached", why or "", seconds, "", {}, ()))
        return outcomes

    def _selected(self, first: str | None, last: str | None) -> list[Step]:
        names = list(STEPS)
        start, stop = names.index(first or names[0]), names.index(last or names[-1])
        if start > stop:
            raise UsageError(f"{first} comes after {last}", where="--from/--until", fix=f"order: {' '.join(names)}")
        for name in (first, last):
            if name and not STEPS[name].wanted(self.config):
                raise _not_wanted(STEPS[name], self.config, self.config_path)
        return [STEPS[name] for name in names[start : stop + 1] if STEPS[name].wanted(self.config)]

    @contextmanager
    def _held(self) -> Iterator[None]:
        with self.workspace.locked():
            self.workspace.claim(self.config_path, takeover=self.force)
            write_json(self.workspace.config, self.config.model_dump(mode="json", by_alias=True, exclude_none=True))
            yield

    def _run(self, step: Step) -> Outcome:
        inputs = step.inputs(self.config, self.workspace)
        record = read_record(self.workspace, step.name)
        why = "--force" if self.force else self._why(step, record)
        if why is None and record is not None:
            if step.name == "analyze":
                record = judged_again(self.config, self.workspace, record)
            outputs = tuple(self.workspace.root / name for name in record.outputs)
            headline = "nothing changed, skipped"
            return Outcome(step.name, "cached", "", record.seconds, headline, record.summary, outputs)
        check_inputs(self.workspace, inputs, producers(self.workspace), options=self._options)
        key = self._key(step)
        # From here on the old result no longer counts: a killed step must not look complete.
        self.workspace.record(step.name).unlink(missing_ok=True)
        if self.force:
            self.workspace.forget(step.name)
        start = time.perf_counter()
        with log_file(self.workspace.log(step.name)):
            log.info("%s: runs (%s)", step.name, why)
            result = step.run(self._context(key))
        seconds = time.perf_counter() - start
        self._record(step, key, result, seconds)
        return Outcome(
            step.name,
            "done",
            why or "",
            seconds,
            result.headline,
            result.summary,
            tuple(result.outputs),
            result.table,
            result.remarks,
        )

    def _record(self, step: Step, key: dict[str, str], result: StepResult, seconds: float) -> None:
        outputs = {self.workspace.name_of(path): FileState.of(path) for path in result.outputs}
        StepRecord(step.name, key, outputs, result.summary, seconds, dependency_versions()).write(self.workspace)

    def _context(self, key: dict[str, str]) -> Context:
        run = self.config.run
        return Context(
            config=self.config,
            workspace=self.workspace,
            reporter=self.reporter,
            key=key,
            device=resolve_device(run.device),
            threads=run.threads or cpu().threads,
        )

    def _why(self, step: Step, record: StepRecord | None) -> str | None:
        if record is None:
            return "never completed"
        if any(not path.exists() for path in step.inputs(self.config, self.workspace)):
            return "an input is missing"
        return why_stale(record, self._key(step), self.workspace.root)

    @property
    def _options(self) -> str:
        """The options with which another command works on this run, as a shell takes them."""
        words = ["--config", str(self.config_path)]
        if self.workspace.output != DEFAULT_OUTPUT:
            words += ["--output", str(self.workspace.output)]
        if self.workspace.run != self.config_path.stem:
            words += ["--run", self.workspace.run]
        return shlex.join(words)

    def _key(self, step: Step) -> dict[str, str]:
        """Return everything the step's result depends on, as flat text."""
        config = self.config
        sections = ("model", "data", "train", step.section, *step.reads)
        key: dict[str, str] = {}
        for name in dict.fromkeys(sections):
            section = getattr(config, name)
            if section is not None:
                key |= flatten(name, section.model_dump(mode="json", exclude_none=True))
        key |= {"run.seed": str(config.run.seed), "run.threads": str(config.run.threads or cpu().threads)}
        key |= {"run.device": resolve_device(config.run.device), "maseRT.sources": source_hash()}
        key |= {"versions.python": sys.version.split()[0]}
        key |= {f"versions.{name}": version for name, version in dependency_versions().items()}
        if step.gpus:
            key |= {"machine.gpus": "; ".join(gpu.name for gpu in nvidia_gpus())}
        return key | self._file_keys(step)

    def _file_keys(self, step: Step) -> dict[str, str]:
        keys = {}
        for path in step.inputs(self.config, self.workspace):
            name = self.workspace.name_of(path)
            record = read_record(self.workspace, producers(self.workspace)[path])
            known = record.outputs.get(name) if record else None
            if known and known.holds(path):
                keys[f"file.{name}"] = known.sha256
            elif path.exists():
                keys[f"file.{name}"] = sha256(path)
        return keys | self._user_keys | self._data_keys

    @cached_property
    def _data_keys(self) -> dict[str, str]:
        """The data files, looked at once a run: a folder of images has many."""
        stats = {file: file.stat() for file in data_files(self.config.data)}
        return {f"file.{file}": f"{stat.st_size} bytes, {stat.st_mtime_ns}" for file, stat in stats.items()}

    @cached_property
    def _user_keys(self) -> dict[str, str]:
        """The user's own files: the checkpoint, and the code of factories and plug-ins.

        Hashed once a run, before anything is imported: an edit while it goes on does not reach what is imported.
        """
        config = self.config
        factories = (config.model.name, config.model.task, config.data.name)
        modules = [name.partition(":")[0] for name in factories if is_factory(name)]
        modules += config.quantize.plugins if config.quantize else ()
        files = [file for module in modules for file in code_files(module)]
        if config.model.checkpoint is not None and config.model.checkpoint.is_file():
            files.append(config.model.checkpoint)
        here = Path.cwd()  # a project may move with its output
        return {f"file.{file.relative_to(here) if file.is_relative_to(here) else file}": sha256(file) for file in files}

    def _check_upstream(self, step: Step) -> None:
        """Compare the records of the steps before this one with the config as it is now.

        Raises:
            StepError: an earlier step's section, or a file it read, has changed since it ran.
        """
        for earlier in STEPS.values():
            if earlier is step:
                return
            record = read_record(self.workspace, earlier.name)
            if record is None or not earlier.wanted(self.config):
                continue
            new = self._key(earlier)
            same_machine = {k: v for k, v in new.items() if not _is_environment(k)}
            same_machine |= {k: v for k, v in record.key.items() if _is_environment(k)}
            stale = why_stale(record, same_machine, self.workspace.root)
            command = f"masert {earlier.name} {self._options}"
            if stale and not self.force:
                raise StepError(
                    f"{earlier.name} is out of date: {stale}",
                    where=step.name,
                    fix=f"run `{command}`, or `masert transform` for all that follows",
                )
            older = why_stale(record, new, self.workspace.root)
            if older:
                log.warning("%s is out of date (%s); taken as it is", earlier.name, older)


def _is_environment(name: str) -> bool:
    return name.startswith(ENVIRONMENT)


def _not_wanted(step: Step, config: Config, path: Path) -> UsageError:
    if step.name == "train" and config.model.checkpoint is not None:
        return UsageError(
            "nothing to train: [model] checkpoint gives the weights",
            where=str(path),
            fix="leave out train, or remove checkpoint",
        )
    return UsageError(f"the config has no [{step.heading}] section", where=str(path), fix=f"add [{step.heading}] to it")
