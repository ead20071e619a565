"""How far we are from the published implementations: the largest difference in every golden case.

    python benchmarks/golden_agreement.py [case ...]

Runs the test files that tests/golden/README.md names, and watches what the tests compare: every call of
``torch.testing.assert_close``, ``torch.equal`` and ``numpy.testing`` in them. A comparison counts for the
case whose stored tensor it is made with; where that tensor was computed with first, for all cases whose
results the test looks at. Cases without numbers (strings, names, shapes) are compared exactly.

Prints a Markdown table, and with ``--update`` writes its rows into docs/models/agreement.md. A test that
fails is named in its place.
"""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/models/agreement.md"
sys.path.insert(0, str(ROOT / "tests"))

import golden_vectors  # noqa: E402


@dataclass(frozen=True)
class Comparison:
    """One call that compared numbers."""

    test: str
    difference: float
    """Largest absolute difference."""
    size: float
    """Largest absolute value of what was expected."""
    share: float
    """Largest difference as a share of what the test allows there."""
    tolerance: str
    is_whole: bool
    """Of whole numbers: grey levels, times, masks."""


class StoredTensors(dict[str, Tensor]):
    """The tensors of a case; says which of them are looked at."""

    def __init__(self, tensors: dict[str, Tensor], on_look: Callable[[str], None]) -> None:
        super().__init__(tensors)
        self._on_look = on_look

    def __getitem__(self, key: str) -> Tensor:
        self._on_look(key)
        return super().__getitem__(key)

    def items(self) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]
        for key in self:
            yield key, self[key]


class Recorder:
    """A pytest plugin that notes the comparisons of each test."""

    def __init__(self) -> None:
        self.comparisons: dict[str, list[Comparison]] = defaultdict(list)
        self.failed: dict[str, set[str]] = defaultdict(set)
        self.stored: dict[str, set[str]] = {}
        self.looked_at: dict[str, set[str]] = defaultdict(set)
        self._owner: dict[int, str] = {}
        self._alive: list[Tensor] = []  # so that no address is used twice
        self._test = ""
        self._cases: set[str] = set()
        self._cases_of_fixture: dict[Any, set[str]] = defaultdict(set)
        self._unattributed: list[Comparison] = []
        self._load, weights = golden_vectors.load, golden_vectors.weights
        golden_vectors.load = self._loading
        golden_vectors.weights = lambda tensors: weights(dict(tensors))  # looks at no results
        torch.testing.assert_close = self._watching(torch.testing.assert_close, has_tolerance=True)
        torch.equal = self._watching(torch.equal)
        np.testing.assert_allclose = self._watching(np.testing.assert_allclose, has_tolerance=True)
        np.testing.assert_array_equal = self._watching(np.testing.assert_array_equal)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self._test, self._cases, self._unattributed = item.nodeid.split("[")[0], set(), []
        result = yield
        for case in self._cases:
            self.comparisons[case] += self._unattributed
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, Any, Any]:
        """A fixture of a module looks at a case once, for all tests that use it."""
        before, self._cases = self._cases, set()
        result = yield
        self._cases_of_fixture[fixturedef] |= self._cases
        self._cases = before
        return result

    def pytest_runtest_call(self, item: pytest.Item) -> None:
        info = getattr(item, "_fixtureinfo", None)
        for fixtures in info.name2fixturedefs.values() if info else ():
            self._cases |= self._cases_of_fixture[fixtures[-1]]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            for case in self._cases or {"(no case)"}:
                self.failed[case].add(report.nodeid)

    def _loading(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, description = self._load(name)
        for tensor in tensors.values():
            self._owner[tensor.untyped_storage().data_ptr()] = name
        self._alive += tensors.values()
        self.stored[name] = {key for key in tensors if not _is_given(key)}

        def on_look(key: str) -> None:
            self.looked_at[name].add(key)
            if not _is_given(key):
                self._cases.add(name)

        return StoredTensors(tensors, on_look), description

    def _watching(self, compare: Callable[..., Any], *, has_tolerance: bool = False) -> Callable[..., Any]:
        def watched(actual: Any, expected: Any, *args: Any, **kwargs: Any) -> Any:
            # What the libraries compare for themselves is not asked here.
            if Path(sys._getframe(1).f_code.co_filename).is_relative_to(ROOT / "tests"):
                rtol, atol = (kwargs.get("rtol"), kwargs.get("atol")) if has_tolerance else (0.0, 0.0)
                result = compare(actual, expected, *args, **kwargs)
                if result is not False:  # tensors that must differ are no agreement
                    for one, other in _pairs(actual, expected):
                        self._note(one, other, rtol, atol)
                return result
            return compare(actual, expected, *args, **kwargs)

        return watched

    def _note(self, actual: Tensor, expected: Tensor, rtol: float | None, atol: float | None) -> None:
        if actual.shape != expected.shape or not actual.numel():
            return
        if rtol is None or atol is None:  # torch's own, by dtype
            rtol, atol = (1.3e-6, 1e-5) if expected.is_floating_point() else (0.0, 0.0)
        size = expected.detach().double().abs()
        difference = (actual.detach().double() - expected.detach().double()).abs()
        share = torch.where(difference == 0, 0.0, difference / (atol + rtol * size))
        noted = Comparison(
            self._test,
            difference.max().item(),
            size.max().item(),
            share.max().item(),
            "exact" if rtol == atol == 0 else f"{rtol:.0e} / {atol:.0e}",
            not expected.is_floating_point(),
        )
        owners = {self._owner.get(values.untyped_storage().data_ptr()) for values in (actual, expected)}
        for case in owners - {None}:
            self.comparisons[str(case)].append(noted)
        if owners == {None}:
            self._unattributed.append(noted)


@dataclass(frozen=True)
class Case:
    """A row of tests/golden/README.md."""

    what: str
    files: list[str]


def listed_cases() -> dict[str, Case]:
    """Read tests/golden/README.md."""
    cases = {}
    for line in (ROOT / "tests/golden/README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and (name := re.fullmatch(r"`([\w-]+)`", cells[0])):
            cases[name[1]] = Case(cells[1], re.findall(r"`([\w/]+\.py)`", cells[2]))
    return cases


def main() -> int:
    """Run the tests and print what they compared."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", help="only these cases")
    parser.add_argument("--tests", action="store_true", help="list what each test compared")
    parser.add_argument("--unread", action="store_true", help="list stored results that no test looks at")
    parser.add_argument("--update", action="store_true", help=f"write the rows into {PAGE.name}")
    chosen = parser.parse_args()
    cases = {name: case for name, case in listed_cases().items() if name in (chosen.cases or [name])}
    recorder = Recorder()
    torch.set_num_threads(1)
    files = sorted({str(ROOT / "tests" / file) for case in cases.values() for file in case.files})
    status = pytest.main(["-q", "--no-header", "--tb=line", f"--rootdir={ROOT}", *files], plugins=[recorder])
    print(
        "\n| case | what | largest difference | of values up to | tolerance (rel / abs) | share of it used |"
    )
    print("|---|---|---|---|---|---|")
    rows = {name: f"| `{name}` | {case.what} | {_measured(name, recorder)} |" for name, case in cases.items()}
    print("\n".join(rows.values()))
    if chosen.update and not status:
        lines = PAGE.read_text(encoding="utf-8").splitlines()
        PAGE.write_text("\n".join(_row_for(line, rows) for line in lines) + "\n", encoding="utf-8")
    for case in cases:
        for noted in (
            sorted(recorder.comparisons[case], key=lambda noted: -noted.share) if chosen.tests else ()
        ):
            print(f"{case}: {noted.difference:.1e} of {noted.size:.3g} ({noted.tolerance}) {noted.test}")
        if chosen.unread and (unread := recorder.stored.get(case, set()) - recorder.looked_at[case]):
            print(f"{case}, unread: {', '.join(sorted(unread))}")
    return int(status)


def _row_for(line: str, rows: dict[str, str]) -> str:
    """Return the new row of a case in place of its old one, any other line as it is."""
    name = re.match(r"\| `([\w-]+)` \|", line)
    return rows.get(name[1], line) if name else line


def _measured(case: str, recorder: Recorder) -> str:
    """Return the last cells of a row. Whole numbers are told apart: a grey level is no rounding error."""
    if recorder.failed[case]:
        return f"FAILED: {', '.join(sorted(recorder.failed[case]))} | | |"
    found = recorder.comparisons[case]
    real = [comparison for comparison in found if not comparison.is_whole]
    whole = max((comparison.difference for comparison in found if comparison.is_whole), default=0)
    levels = f"{whole:.0f} level of 8 bits" if whole else ""
    if not real:
        return f"{levels or 'none'} | | | |" if found else "none | no numbers | exact |"
    largest = max(real, key=lambda comparison: comparison.difference)
    worst = max(real, key=lambda comparison: comparison.share)
    differences = "; ".join(filter(None, [f"{largest.difference:.1e}", levels]))
    return f"{differences} | {largest.size:.3g} | {worst.tolerance} | {worst.share:.0%}"


def _is_given(key: str) -> bool:
    """Whether a stored tensor went into the reference, rather than coming out."""
    return key.startswith(("w.", "in."))


def _pairs(actual: Any, expected: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Flatten what was compared into pairs of tensors."""
    if isinstance(expected, dict):
        for key in expected:
            yield from _pairs(actual[key], expected[key])
    elif isinstance(expected, list | tuple) and any(isinstance(value, Tensor) for value in expected):
        for one, other in zip(actual, expected, strict=True):
            yield from _pairs(one, other)
    else:
        yield torch.as_tensor(actual), torch.as_tensor(expected)


if __name__ == "__main__":
    sys.exit(main())
