"""A table of requests says what the run holds, in CSV and in parquet, and gives it back."""

import csv
import sys
from pathlib import Path

import pytest

from runs import served_run
from tierline.base.errors import DependencyError, InputError
from tierline.sim import table
from tierline.sim.measure import summary
from tierline.sim.table import read_requests, write_requests

FORMATS = ("requests.csv", "requests.csv.gz", "requests.parquet")


@pytest.mark.parametrize("at_once", [50_000, 17])
@pytest.mark.parametrize("name", FORMATS)
def test_a_table_that_is_read_back_has_the_hash_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at_once: int
) -> None:
    """INV-SIM-22, and every other column with it; however many rows are written at once."""
    monkeypatch.setattr(table, "ROWS_AT_ONCE", at_once)
    run = served_run(count=120)
    write_requests(run, tmp_path / name)
    again = read_requests(tmp_path / name)

    assert again.hash() == run.hash()
    for column in type(run.requests).__slots__:
        assert len(getattr(again.requests, column)) == 120
    assert again.requests.arrival_ps == run.requests.arrival_ps
    assert [again.tenants[i] for i in again.requests.tenant] == [
        run.tenants[i] for i in run.requests.tenant
    ]
    assert {g.name: g.ttft for g in summary(again).levels} == {
        g.name: g.ttft for g in summary(run).levels
    }


def test_a_changed_cell_is_another_hash(tmp_path: Path) -> None:
    """Negative control of the test above."""
    run, path = served_run(count=120), tmp_path / "requests.csv"
    write_requests(run, path)
    text = path.read_text()
    path.write_text(text.replace(str(run.requests.finish_ps[40]), "77", 1))

    assert read_requests(path).hash() != run.hash()


def test_equal_runs_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.csv.gz", "b.csv.gz"):
        (tmp_path / name[0]).mkdir()
        write_requests(served_run(count=50), tmp_path / name[0] / "requests.csv.gz")

    assert (tmp_path / "a/requests.csv.gz").read_bytes() == (
        tmp_path / "b/requests.csv.gz"
    ).read_bytes()


def test_a_person_reads_seconds_and_outcomes(tmp_path: Path) -> None:
    run = served_run(count=50)
    write_requests(run, tmp_path / "requests.csv")
    rows = list(csv.DictReader((tmp_path / "requests.csv").read_text().splitlines()))

    assert rows[3]["outcome"] == "refused"
    assert rows[3]["ttft_s"] == ""
    assert rows[0]["class"] == "chat"
    late_ps = run.requests.first_ps[7] - run.requests.arrival_ps[7]
    assert float(rows[7]["ttft_s"]) == late_ps / 1e12


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no column 'class'"),
        ("a,b\n1,2\n", "no column 'class'"),
        ("a,b\n1,2\n1\n", "different lengths"),
        ("a\n1,2\n", "longer than its head"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "requests.csv"
    path.write_text(text)

    with pytest.raises(InputError, match=said):
        read_requests(path)


@pytest.mark.parametrize(
    ("old", "new", "said"), [("finished", "ended", "ended"), ("first_ps", "x", "first_ps")]
)
def test_a_bent_table_is_refused_by_name(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "requests.csv"
    write_requests(served_run(count=30), path)
    path.write_text(path.read_text().replace(old, new))

    with pytest.raises(InputError, match=said):
        read_requests(path)


def test_a_cut_file_and_a_wrong_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv.gz"
    write_requests(served_run(count=30), path)
    path.write_bytes(path.read_bytes()[:100])
    (tmp_path / "not.parquet").write_text("words")

    for broken in (path, tmp_path / "not.parquet", tmp_path / "none.csv"):
        with pytest.raises(InputError, match="cannot read table"):
            read_requests(broken)
    with pytest.raises(InputError, match="unknown format"):
        write_requests(served_run(count=30), tmp_path / "requests.xls")


def test_without_pyarrow_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    with pytest.raises(DependencyError, match="pyarrow") as caught:
        write_requests(served_run(count=30), tmp_path / "requests.parquet")
    assert "csv" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "blocker").write_text("in the way")

    with pytest.raises(DependencyError, match="cannot write"):
        write_requests(served_run(count=30), tmp_path / "blocker" / "requests.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["blocker"]
