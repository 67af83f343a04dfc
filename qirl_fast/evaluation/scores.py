"""Scores of a prompt file's samples on disk: one line a prompt, kept however the process ends.

`scores.jsonl` is append-only and synced line by line. A line is
`{"row": 4, "id": ..., "category": ..., "prompt": ..., "scores": {judge: [number or null, ...]},
"failures": {judge: {sample: reason}}}`, row counted from 0 in the prompt file. A null with a reason
has failed, one without is missing (there was nothing to judge). float32 scores come back bit for
bit. A later line of a row stands for an earlier one, as when a failed judge was asked again; a last
line that a crash cut off is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from qirl_fast.rewards.composite import shaped
from qirl_fast.rewards.edits import EditRule
from qirl_fast.rewards.judge import FAILED, MISSING, SCORED
from qirl_fast.rewards.tiers import Tier
from qirl_fast.rewards.verdict import Verdict


@dataclass(frozen=True)
class Record:
    """Every judge's scores of one prompt's n samples."""

    row: int
    id: str
    category: str | None
    prompt: str
    scores: dict[str, list[float | None]]
    failures: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """True where a judge failed on a sample, so that asking again may help."""
        return bool(self.failures)


class ScoreFile:
    """The records of one file. names: the judges; samples: n of each prompt.

    `records`: by row. Raises ValueError, naming file and line, for a line that is no record of
    these judges and this many samples.
    """

    def __init__(self, path: str | os.PathLike[str], names: Sequence[str], samples: int) -> None:
        self.path, self.names, self.samples = Path(path), tuple(names), samples
        self.records: dict[int, Record] = {}
        self._file: TextIO | None = None
        raw = self.path.read_bytes() if self.path.exists() else b""
        *lines, torn = raw.split(b"\n")
        for number, line in enumerate(lines, start=1):
            record = self._parse(line, number)
            self.records[record.row] = record
        if torn:
            self._rewrite([line.decode() for line in lines])

    def _parse(self, line: bytes, number: int) -> Record:
        try:
            record = Record(**json.loads(line))
            sizes = {name: len(values) for name, values in record.scores.items()}
            if type(record.row) is not int or sizes != dict.fromkeys(self.names, self.samples):
                raise ValueError(f"scores of {sizes}, row {record.row!r}")
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path}:{number}: no record of {self.samples} samples scored by "
                f"{', '.join(self.names)} ({error}); repair or remove the line"
            ) from error
        return record

    def append(self, record: Record) -> None:
        """Add a record; it is on disk when this returns."""
        self._file = self._file or self.path.open("a", encoding="utf-8")
        self._file.write(_line(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records[record.row] = record

    def finish(self) -> None:
        """Close the file, one line a row and in their order."""
        if self._file:
            self._file.close()
            self._file = None
        self._rewrite([_line(record) for record in self.ordered()])

    def _rewrite(self, lines: Iterable[str]) -> None:
        beside = self.path.with_name(f".{self.path.name}.tmp")
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)

    def ordered(self) -> list[Record]:
        """The records by row."""
        return [self.records[row] for row in sorted(self.records)]

    def array(self, tiers: Sequence[Tier] = (), edit: EditRule | None = None) -> np.ndarray:
        """Scores float64 [P, n, K] in the order of the rows and of `names`, by the rules by which
        they are optimised; NaN: none.
        """
        values = [[record.scores[name] for name in self.names] for record in self.ordered()]
        shape = (len(values), len(self.names), self.samples)
        s_PnK = np.array(values, np.float64).reshape(shape).swapaxes(1, 2)
        if not tiers and edit is None:
            return s_PnK
        s_BK, status_BK = (a.reshape(-1, len(self.names)) for a in (s_PnK, self.status()))
        s_BK, status_BK = shaped(s_BK, status_BK, self.names, tiers, edit)
        return np.where(status_BK == SCORED, s_BK, np.nan).reshape(s_PnK.shape)

    def status(self) -> np.ndarray:
        """int8 [P, n, K] of SCORED, FAILED, MISSING."""
        status_PnK = np.where(np.isnan(self.array()), MISSING, SCORED).astype(np.int8)
        for p, record in enumerate(self.ordered()):
            for name, reasons in record.failures.items():
                status_PnK[p, [int(i) for i in reasons], self.names.index(name)] = FAILED
        return status_PnK


def _line(record: Record) -> str:
    return json.dumps(asdict(record), ensure_ascii=False, allow_nan=False)


def judged(names: Sequence[str], verdict: Verdict, rows: range) -> dict[str, Any]:
    """`scores` and `failures` of a Record from the verdict on a prompt's `rows` of a batch."""
    scores: dict[str, list[float | None]] = {}
    failures: dict[str, dict[str, str]] = {}
    for k, name in enumerate(names):
        scores[name] = [
            float(verdict.scores[i, k]) if verdict.status[i, k] == SCORED else None for i in rows
        ]
        reasons = {
            str(i - rows.start): verdict.reasons.get((i, name), "no reason given")
            for i in rows
            if verdict.status[i, k] == FAILED
        }
        failures |= {name: reasons} if reasons else {}
    return {"scores": scores, "failures": failures}
