"""What a reward server counts, in Prometheus' text format (version 0.0.4)."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from qirl_fast.rewards.served import Answer
from qirl_fast.rewards.wire_answer import STATUS

BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """judges: the only names that become labels, so that clients cannot add any."""

    def __init__(self, judges: Sequence[str]) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._repeated = Counter(dict.fromkeys(judges, 0))
        self._rows = Counter({(name, state): 0 for name in judges for state in STATUS})
        self._in_bucket = {name: [0] * (len(BUCKETS_S) + 1) for name in judges}
        self._seconds = dict.fromkeys(judges, 0.0)

    def answered(self, path: str, status: int) -> None:
        """A request of a known path got its answer."""
        self._requests[path, status] += 1

    def repeated(self, judge: str) -> None:
        """A question came again and was not computed again."""
        self._repeated[judge] += 1

    def judged(self, judge: str, answer: Answer) -> None:
        """A question was computed."""
        for state, count in answer.rows.items():
            self._rows[judge, state] += count
        self._in_bucket[judge][bisect_left(BUCKETS_S, answer.seconds)] += 1
        self._seconds[judge] += answer.seconds

    def text(self, in_flight: int) -> str:
        """All of it; in_flight: requests held now."""
        lines = _head("requests_total", "counter", "answered requests")
        lines += [
            _line("requests_total", {"path": path, "status": str(status)}, count)
            for (path, status), count in sorted(self._requests.items())
        ]
        lines += _head("rows_total", "counter", "judged rows by what became of them")
        lines += [
            _line("rows_total", {"judge": judge, "state": state}, count)
            for (judge, state), count in self._rows.items()
        ]
        lines += _head("repeated_total", "counter", "questions asked again and not computed again")
        lines += [_line("repeated_total", {"judge": j}, n) for j, n in self._repeated.items()]
        lines += _head("in_flight", "gauge", "requests read, waiting or judged now")
        lines.append(_line("in_flight", {}, in_flight))
        lines += _head("seconds", "histogram", "time the judge took for a request")
        for judge, counts in self._in_bucket.items():
            total = 0
            for limit, count in zip([*map(str, BUCKETS_S), "+Inf"], counts, strict=True):
                total += count
                lines.append(_line("seconds_bucket", {"judge": judge, "le": limit}, total))
            lines.append(_line("seconds_sum", {"judge": judge}, self._seconds[judge]))
            lines.append(_line("seconds_count", {"judge": judge}, total))
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, meaning: str) -> list[str]:
    return [f"# HELP qirl_reward_{name} {meaning}", f"# TYPE qirl_reward_{name} {kind}"]


def _line(name: str, labels: dict[str, str], value: float) -> str:
    quoted = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"qirl_reward_{name}{'{' + quoted + '}' if quoted else ''} {value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
