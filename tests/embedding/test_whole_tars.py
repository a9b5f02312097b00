"""Tars that are listed as one input each: their rows are those of the images that a listing of their headers finds."""

import io
import os
import shutil
import tarfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from faulty_actors import OneByOneMaker
from input_samples import ids, kinds, picture, write_tar
from jobs import errors, rows, table

from nopad import embed, read_features
from nopad.embedding import distributed, table_run
from nopad.embedding.borders import Borders
from nopad.embedding.inputs import archives, reaching, whole_tars
from nopad.embedding.inputs.listing import InputList
from nopad.embedding.inputs.sources import list_inputs
from nopad.embedding.inputs.whole_tars import WHOLE_TAR, WholeTars, expanded
from nopad.embedding.plan import plan
from nopad.embedding.settings import Settings
from nopad.storage.remote_file import BLOCK_BYTES

NAMES = [f"{number:03}" for number in range(24)]


def image(number: int) -> bytes:
    return picture(9 * number, 30 + number % 5, 40)


def write(path: Path, names: list[str], more: tuple[tuple[str, bytes], ...] = ()) -> Path:
    """A WebDataset of images whose pixels are by their names."""
    members = [(f"{name}.png", image(int(name))) for name in names]
    texts = [(f"{name}.json", b'{"number": %d}' % int(name)) for name in names]
    return write_tar(path, [*(each for pair in zip(members, texts, strict=True) for each in pair), *more])


@pytest.fixture(autouse=True)
def _small(monkeypatch) -> None:
    """Tars of any size are whole, and each is a shard."""
    monkeypatch.setattr(whole_tars, "MIN_BYTES", 1)
    monkeypatch.setattr(whole_tars, "IMAGE_BYTES", 4)
    monkeypatch.setattr(reaching.retry, "waits", (0.0, 0.0))


@pytest.fixture
def model(goldens) -> Path:
    return goldens / "aimv2-apple-native"


@pytest.fixture
def tars(tmp_path) -> Path:
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(4):
        write(folder / f"{number}.tar", NAMES[6 * number : 6 * number + 6])
    return folder


def listed(monkeypatch) -> None:
    """Tars are listed by their headers."""
    monkeypatch.setattr(table_run, "lists_whole_tars", lambda settings, begun: False)


def run(sources, out: Path, model: Path, **options):
    return embed(sources, out, model=model, **{"workers": 2, **options})


def statuses(out: Path) -> list[tuple[str, str]]:
    return [(row["id"], row["status"]) for row in rows(out)]


# What is listed, and the rows


def test_no_tar_is_read_to_be_listed(tars, tmp_path, model, read_tars):
    listing = list_inputs([str(tars)], whole_tars=True)
    assert (ids(listing), kinds(listing)) == (["0.tar", "1.tar", "2.tar", "3.tar"], [WHOLE_TAR] * 4)
    status = (tars / "1.tar").stat()
    assert (listing.inputs[1].size, listing.inputs[1].offset) == (status.st_size, status.st_mtime_ns)
    summary = run(tars, tmp_path / "out", model)
    assert (summary.rows, summary.failed, len(table(tmp_path / "out"))) == (24, 0, 4)
    assert run(tars, tmp_path / "out", model).done == 0
    assert run(tars, tmp_path / "parts", model, part=(0, 2)).rows == 12
    assert read_tars == []


def test_rows_are_those_of_listed_members(tars, tmp_path, model, monkeypatch):
    write(tars / "4.tar", ["022", "001"], (("._hidden.png", image(3)), ("broken.png", b"no image"), ("a.md", b"text")))
    with tarfile.open(tars / "5.tar", "w") as archive:
        member = tarfile.TarInfo("long/" + "x" * 200 + ".png")
        member.size = len(data := image(5))
        archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.LNKTYPE, member.name
        archive.addfile(link)
    cut = write(tars / "6.tar", ["007", "008"])
    os.truncate(cut, 3000)
    sources = [tars, tars / "{2..9}.tar"]
    run(sources, tmp_path / "out", model, keep="number")
    listed(monkeypatch)
    run(sources, tmp_path / "listed", model, keep="number")
    assert rows(tmp_path / "out") == rows(tmp_path / "listed")
    assert len(errors(tmp_path / "out")) == 5
    assert {row["number"] for row in rows(tmp_path / "out")} >= {"7", "22"}
    assert table(tmp_path / "out").keys() != table(tmp_path / "listed").keys()
    assert not (tmp_path / "listed" / ".nopad" / "members").exists()


def test_hidden_members_are_taken_on_request(tmp_path, model):
    tar = write(tmp_path / "a.tar", ["001"], (("._hidden.png", image(3)),))
    run(tar, tmp_path / "out", model, hidden=True)
    assert statuses(tmp_path / "out") == [("001.png", "ok"), ("._hidden.png", "ok")]


def test_tars_without_images_are_failed_rows(tars, tmp_path, model):
    write_tar(tars / "4.tar", [("a.md", b"text"), ("b.md", b"text")])
    run(tars, tmp_path / "out", model)
    assert errors(tmp_path / "out") == {"4.tar": "no image in it; left out: 2 .md"}


def test_shards_whose_rows_are_counted_or_large_list_members(tars, tmp_path, model, monkeypatch):
    for name, options in {
        "rows": {"shard_size": 5},
        "tokens": {"tokens": True},
        "hash": {"content_hash": True},
    }.items():
        run(tars, tmp_path / name, model, **options)
        assert WHOLE_TAR not in {item.kind for item in InputList.load(tmp_path / name / ".nopad" / "inputs.parquet")}
    monkeypatch.setattr(whole_tars, "MAX_BYTES", 10)
    assert kinds(list_inputs([str(tars)], whole_tars=True)) == ["tar"] * 24


def test_small_tars_are_joined_and_large_ones_are_shards():
    sizes = np.array([500, 500, 500, 3000, 700, 700], np.int64)  # of four bytes for an image
    tars, units = WholeTars(np.arange(6), sizes), np.array([[place, place + 1] for place in range(6)])
    borders = Borders.at_units(units, (300, 3000), 6, None, tars)
    assert [(each.start, each.stop) for each in borders] == [(0, 3), (3, 4), (4, 6)]
    assert tars.num_images(6) == sum(sizes) // 4
    of_both = Borders.at_units(units + 10, (300, 3000), 16, None, WholeTars(np.arange(10, 16), sizes))
    assert [(each.start, each.stop) for each in of_both] == [(0, 13), (13, 14), (14, 16)]


def test_found_images_count_all_bytes(tars):
    found = whole_tars.Found()
    listing = list_inputs([str(tars)], whole_tars=True)
    images = expanded(listing.inputs, None, found)
    next(images)
    assert 0 < found.bytes < listing.whole_tars.num_bytes / 4
    assert len([*images]) == 23
    assert (found.images, found.bytes) == (24, listing.whole_tars.num_bytes)


# However it is made


def test_resumed_by_actors_or_in_parts_the_table_has_the_same_bytes(
    tars, tmp_path, model, stop_after, parts_in_process
):
    run(tars, tmp_path / "whole", model)
    expected = table(tmp_path / "whole")
    run(tars, tmp_path / "actors", model, actors=2)
    assert table(tmp_path / "actors") == expected
    for part in ((1, 2), (0, 2)):
        summary = run(tars, tmp_path / "parts", model, part=part)
    assert table(tmp_path / "parts") == expected
    assert (summary.rows, summary.missing) == (24, 0)
    stopped = run(tars, tmp_path / "stopped", model, **stop_after(1))
    assert 1 <= 4 - stopped.missing == len(table(tmp_path / "stopped")) < 4
    resumed = run(tars, tmp_path / "stopped", model)
    assert (resumed.rows, resumed.missing, resumed.done) == (24, 0, 24 - stopped.done)
    assert table(tmp_path / "stopped") == expected


def test_an_image_that_ends_its_process_is_found_in_its_tar(tars, tmp_path, model, monkeypatch):
    write(tars / "2.tar", NAMES[12:15], (("kill-a.png", image(1)), ("099.png", image(99))))
    monkeypatch.setattr("nopad.embedding.actors.work.MAX_DEATHS", 1)
    monkeypatch.setattr("nopad.embedding.actors.bisection.NUM_CONFIRMATIONS", 1)
    monkeypatch.setattr(distributed, "ShardMaker", OneByOneMaker)
    summary = run(tars, tmp_path / "out", model, actors=1)
    reason = "the process that embedded it died, also with it alone: it was ended by SIGKILL"
    assert errors(tmp_path / "out") == {"kill-a.png": reason}
    assert (summary.rows, summary.failed, summary.missing) == (23, 1, 0)


@contextmanager
def second_tar_unreachable(monkeypatch):
    """Reading 1.tar fails, as of a disk; its size and first bytes are there."""
    real = archives.open_source

    def fail(path, *arguments):
        if path.endswith(b"1.tar"):
            raise OSError(5, "Input/output error")
        return real(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(archives, "open_source", fail)
        patch.setattr(whole_tars, "is_compressed", lambda path: False)
        yield


def test_a_tar_is_tried_again_where_it_cannot_be_reached(tars, tmp_path, model, monkeypatch):
    run(tars, tmp_path / "whole", model)
    with second_tar_unreachable(monkeypatch):
        summary = run(tars, tmp_path / "out", model)
    assert (summary.rows, summary.missing, summary.to_go) == (18, 1, 1)
    (reason,) = summary.unmade.values()
    assert "1.tar: cannot be reached now: Input/output error" in reason
    assert not [*(tmp_path / "out").rglob("*.part")]
    run(tars, tmp_path / "out", model)
    assert table(tmp_path / "out") == table(tmp_path / "whole")


def test_unreachable_tars_become_rows_on_request_and_are_made_by_a_retry(tars, tmp_path, model, monkeypatch):
    with second_tar_unreachable(monkeypatch):
        run(tars, tmp_path / "out", model, unreachable_rows=True)
    assert [*errors(tmp_path / "out")] == ["1.tar"]
    assert errors(tmp_path / "out")["1.tar"].startswith("unreachable: ")
    summary = run(tars, tmp_path / "out", model, retry_failed=True)
    assert (summary.rows, summary.failed, summary.to_go) == (24, 0, 0)
    run(tars, tmp_path / "whole", model)
    assert table(tmp_path / "out") == table(tmp_path / "whole")


def test_a_retry_leaves_a_shard_whose_tar_cannot_be_reached(tars, tmp_path, model, monkeypatch):
    write(tars / "1.tar", NAMES[6:12], (("x.png", bytes(100)),))
    run(tars, tmp_path / "out", model)
    before = table(tmp_path / "out")
    with second_tar_unreachable(monkeypatch):
        summary = run(tars, tmp_path / "out", model, retry_failed=True)
    assert (len(summary.unmade), summary.to_go, table(tmp_path / "out")) == (1, 1, before)


def test_tars_of_a_mount_that_is_gone_make_no_rows(tars, tmp_path, model, monkeypatch):
    listing = list_inputs([str(tars)], whole_tars=True)
    shutil.move(tars, tmp_path / "away")
    with pytest.raises(ValueError, match="is a file system not mounted"):
        [*expanded(listing.inputs, None)]
    tars.mkdir()
    shutil.copy(tmp_path / "away" / "0.tar", tars)
    found = [*expanded(listing.inputs, None)]
    assert [item.kind for item in found] == ["tar"] * 6 + ["broken"] * 3
    assert found[-1].note == "cannot be read: No such file or directory"


# Again: retried, updated, read


@pytest.mark.parametrize("options", [{}, {"actors": 1}], ids=["here", "actor"])
def test_failed_images_are_tried_again_in_their_place(tars, tmp_path, model, options):
    (tars / "1.tar").unlink()
    good = image(50)
    write(tars / "1.tar", NAMES[6:8], (("x.png", bytes(len(good))), *[(f"{n}.png", image(n)) for n in (8, 9)]))
    run(tars, tmp_path / "out", model)
    before = statuses(tmp_path / "out")
    assert [*errors(tmp_path / "out")] == ["x.png"]
    data = (tars / "1.tar").read_bytes()
    write(tars / "1.tar", NAMES[6:8], (("x.png", good), *[(f"{n}.png", image(n)) for n in (8, 9)]))
    assert len(data) == (tars / "1.tar").stat().st_size
    summary = run(tars, tmp_path / "out", model, retry_failed=True, **options)
    assert (summary.failed, summary.to_go, summary.done) == (0, 0, 1)
    assert [id for id, _ in before] == [id for id, _ in statuses(tmp_path / "out")]
    run(tars, tmp_path / "whole", model)
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")


@pytest.mark.parametrize("options", [{}, {"actors": 1}], ids=["here", "actor"])
def test_a_tar_that_was_missing_is_made_as_a_whole(tars, tmp_path, model, options, stop_after):
    run(tars, tmp_path / "whole", model)
    stopped = run(tars, tmp_path / "out", model, **stop_after(1))
    number = 4 - stopped.missing
    away = tars / "3.tar"
    size = away.stat()
    away.rename(tmp_path / "3.tar")
    listing = list_inputs([str(tars)], whole_tars=True)
    assert len(listing.inputs) == 3
    summary = run(tars, tmp_path / "out", model)
    assert number < 4
    assert errors(tmp_path / "out") == {"3.tar": "cannot be read: No such file or directory"}
    assert (summary.rows, summary.failed) == (19, 1)
    (tmp_path / "3.tar").rename(away)
    assert away.stat().st_size == size.st_size
    summary = run(tars, tmp_path / "out", model, retry_failed=True, **options)
    assert (summary.rows, summary.failed, summary.to_go, summary.done) == (24, 0, 0, 6)
    assert table(tmp_path / "out") == table(tmp_path / "whole")


def test_rows_of_a_tar_that_has_others_now_are_not_lost_by_a_retry(tars, tmp_path, model):
    write(tars / "1.tar", NAMES[6:8], (("x.png", b"no image"),))
    run(tars, tmp_path / "out", model)
    before = table(tmp_path / "out")
    size = (tars / "1.tar").stat().st_size
    write(tars / "1.tar", [NAMES[6], NAMES[9]], (("x.png", b"no image"),))
    assert (tars / "1.tar").stat().st_size == size
    summary = run(tars, tmp_path / "out", model, retry_failed=True)
    (reason,) = summary.unmade.values()
    assert "007.png is not there any more; --update takes it as it is now" in reason
    assert table(tmp_path / "out") == before


def test_one_of_two_images_of_a_name_is_not_lost_by_a_retry(tars, tmp_path, model):
    twice = ("006.png", image(7))
    write(tars / "1.tar", ["006"], (twice, ("x.png", b"no image")))
    run(tars, tmp_path / "out", model)
    before, size = table(tmp_path / "out"), (tars / "1.tar").stat().st_size
    write(tars / "1.tar", ["006"], (("007.txt", image(7)), ("x.png", b"no image")))
    assert (tars / "1.tar").stat().st_size == size
    (reason,) = run(tars, tmp_path / "out", model, retry_failed=True).unmade.values()
    assert "006.png is not there any more" in reason
    assert table(tmp_path / "out") == before


def test_an_update_marks_images_beside_whole_tars(tars, tmp_path, model, monkeypatch):
    monkeypatch.setattr(whole_tars, "IMAGE_BYTES", 1 << 17)  # all are one shard
    (folder := tmp_path / "images").mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(image(number))
    sources = [folder, tars]
    run(sources, tmp_path / "out", model)
    assert len(table(tmp_path / "out")) == 1
    (folder / "1.png").unlink()
    (tars / "2.tar").unlink()
    for changes in ("0 are new, 0 have changed, 2 are gone", ""):
        summary = run(sources, tmp_path / "out", model, update=True)
        assert summary.changes == [f"in the sources {changes}" if changes else "nothing has changed in the sources"]
        gone = [id for id, status in statuses(tmp_path / "out") if status == "gone"]
        assert gone == ["1.png", *[f"{name}.png" for name in NAMES[12:18]]]


def test_an_update_marks_and_makes_whole_tars(tars, tmp_path, model):
    sources = [tars, tars / "0.tar"]
    run(sources, tmp_path / "out", model)
    assert run(sources, tmp_path / "out", model, update=True).changes == ["nothing has changed in the sources"]
    write(tars / "1.tar", ["030", "031"])
    (tars / "2.tar").unlink()
    write(tars / "4.tar", ["032"])
    summary = run(sources, tmp_path / "out", model, update=True)
    assert summary.changes == ["in the sources 1 are new, 1 have changed, 1 are gone"]
    status = dict.fromkeys(NAMES[6:12], "changed") | dict.fromkeys(NAMES[12:18], "gone")
    first = [(f"{name}.png", status.get(name, "ok")) for name in [*NAMES, *NAMES[:6]]]
    new = [(f"{name}.png", "ok") for name in ("030", "031", "032")]
    assert sorted(statuses(tmp_path / "out")) == sorted([*first, *new])
    assert len(table(tmp_path / "out")) == 5 + 2  # each tar is one
    assert len(read_features(tmp_path / "out")) == 21
    again = run(sources, tmp_path / "out", model, update=True)
    assert (again.changes, again.done) == (["nothing has changed in the sources"], 0)
    (tars / "0.tar").unlink()
    run([tars], tmp_path / "out", model, update=True)
    assert sum(status == "gone" for _, status in statuses(tmp_path / "out")) == 18


def test_one_of_two_that_are_the_same_is_gone(tars, tmp_path, model):
    sources = [tars / "0.tar", tars / "0.tar", tars / "1.tar"]
    run(sources, tmp_path / "out", model)
    run(sources[1:], tmp_path / "out", model, update=True)
    assert [status for _, status in statuses(tmp_path / "out")].count("gone") == 6


def test_a_tar_of_another_time_is_left_but_by_an_update(tars, tmp_path, model):
    run(tars, tmp_path / "out", model)
    os.utime(tars / "1.tar", (1, 1))
    assert run(tars, tmp_path / "out", model).changes == []
    summary = run(tars, tmp_path / "out", model, update=True)
    assert summary.changes == ["in the sources 0 are new, 1 have changed, 0 are gone"]


def test_a_table_that_lists_members_goes_on_with_them(tars, tmp_path, model, monkeypatch, stop_after):
    with monkeypatch.context() as patch:
        listed(patch)
        run(tars, tmp_path / "out", model)
    assert run(tars, tmp_path / "out", model).done == 0
    write(tars / "4.tar", ["030"])
    assert run(tars, tmp_path / "out", model, update=True).done == 1
    inputs = [*(tmp_path / "out").glob("**/inputs.parquet")]
    assert len(inputs) == 2
    assert {item.kind for path in inputs for item in InputList.load(path)} == {"tar"}


def test_a_tar_of_another_size_is_refused_or_a_failed_row(tars, tmp_path, model, stop_after):
    stopped = run(tars, tmp_path / "out", model, **stop_after(1))
    assert stopped.missing
    write(tars / "3.tar", NAMES)
    with pytest.raises(ValueError, match=r"1 input is elsewhere now; the first is 3\.tar of .*bytes there, "):
        run(tars, tmp_path / "out", model)
    item = list_inputs([str(tars / "0.tar")], whole_tars=True).inputs[0]
    write(tars / "0.tar", NAMES)
    (found,) = expanded([item], None)
    assert (found.kind, found.id) == ("broken", "0.tar")
    assert found.note.endswith(f"and had {item.size:,} when it was listed; --update takes it as it is now")


def test_rows_lead_to_their_images(tars, tmp_path, model, monkeypatch):
    run(tars, tmp_path / "out", model)
    features = read_features(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(whole_tars, "tar_inputs", None)  # where they are was kept
        assert [features.read(row) for row in (0, 7, 23)] == [image(0), image(7), image(23)]
    assert features.path(7) == str(tars / "1.tar")
    shutil.rmtree(tmp_path / "out" / ".nopad" / "members")
    assert read_features(tmp_path / "out").read(7) == image(7)
    write(tars / "1.tar", NAMES)
    changed = read_features(tmp_path / "out")
    with pytest.raises(ValueError, match=r"row 1: it has .* bytes, and had .* when it was listed; --update takes it"):
        changed.read(7)


@pytest.mark.parametrize("is_kept", [True, False], ids=["kept", "found again"])
def test_rows_beside_a_tar_that_has_changed_or_is_gone_lead_to_their_images(
    tars, tmp_path, model, monkeypatch, is_kept
):
    monkeypatch.setattr(whole_tars, "IMAGE_BYTES", 1 << 17)  # all are one shard
    write(tars / "3.tar", ["018", "019"], (("019.png", image(20)),))
    run(tars, tmp_path / "out", model)
    assert len(table(tmp_path / "out")) == 1
    if not is_kept:
        shutil.rmtree(tmp_path / "out" / ".nopad" / "members")
    write(tars / "0.tar", NAMES)
    (tars / "2.tar").unlink()
    features = read_features(tmp_path / "out")
    found = [features.read(row) for row in (*range(6, 12), *range(18, 21))]
    assert found == [image(number) for number in (*range(6, 12), *range(18, 21))]
    with pytest.raises(
        ValueError, match="row 1: its tar has other images" if is_kept else "row 1: it has 51,200 bytes"
    ):
        features.read(1)
    with pytest.raises(ValueError, match="cannot be read: No such file or directory"):
        features.read(13)


def test_no_link_is_written_through(tars, tmp_path, model, stop_after):
    run(tars, tmp_path / "out", model, **stop_after(1))
    shutil.rmtree(members := tmp_path / "out" / ".nopad" / "members")
    (tmp_path / "elsewhere").mkdir()
    members.symlink_to(tmp_path / "elsewhere")
    run(tars, tmp_path / "out", model)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_job_goes_on_where_places_cannot_be_kept(tars, tmp_path, model, stop_after):
    run(tars, tmp_path / "out", model, **stop_after(1))
    shutil.rmtree(members := tmp_path / "out" / ".nopad" / "members")
    members.write_text("a file")
    assert run(tars, tmp_path / "out", model).missing == 0
    assert read_features(tmp_path / "out").read(7) == image(7)


def test_a_plan_samples_the_beginning_of_tars(tars, model):
    planned = plan([str(tars)], Settings(model=str(model)), sample=100)
    assert (planned.inputs, planned.sample, planned.shards, planned.shard_rows) == (24, 24, 4, 6)
    assert planned.tars.startswith("4 tars of 0.0")
    fewer = plan([str(tars)], Settings(model=str(model)), sample=8)
    assert (fewer.sample, 18 <= fewer.inputs <= 36) == (6, True)
    of_two = [str(write(tars / f"{number}.tar", NAMES[:12])) for number in range(2)]
    assert plan(of_two, Settings(model=str(model)), sample=17).sample == 17


def test_progress_says_what_is_known(tars, tmp_path, model):
    seen = []
    run(tars, tmp_path / "out", model, progress=seen.append)
    assert (seen[-1].rows, seen[-1].stats.images, seen[-1].tars) == (24, 24, "")
    assert all(each.tars.startswith("4 tars of 0.0") for each in seen if each.rows != 24)
    assert list_inputs([str(tars)], whole_tars=True).describe() == "4 tars of 0.00 GB"


def test_progress_counts_rows_of_tars_that_were_made_before(tars, tmp_path, model, stop_after):
    seen = []
    stopped = run(tars, tmp_path / "out", model, **stop_after(1))
    run(tars, tmp_path / "out", model, progress=seen.append)
    assert {each.rows_before for each in seen} == {stopped.done}
    assert seen[-1].rows == 24 - stopped.done


# In object stores


def filler(number: int) -> tuple[str, bytes]:
    return f"{number}.bin", np.random.default_rng(number).bytes(1 << 20)


@pytest.fixture
def remote(s3, tmp_path) -> Path:
    """Tars of nine MiB in a bucket, and on disk."""
    folder = tmp_path / "here"
    folder.mkdir()
    for number in range(3):
        members = [(f"{name}.png", image(int(name))) for name in NAMES[6 * number : 6 * number + 6]]
        gaps = [filler(each) for each in range(9)]
        write_tar(folder / f"{number}.tar", [*members[:3], *gaps[:4], *members[3:5], *gaps[4:], *members[5:]])
    s3.put_all(folder, "tars/")
    s3.server.requests.clear()
    return folder


def test_each_block_of_a_tar_is_fetched_once(remote, s3, tmp_path, model):
    summary = run("s3://photos/tars", tmp_path / "out", model)
    assert (summary.rows, summary.failed) == (18, 0)
    gets = [each for each in s3.server.requests if each.startswith("GET") and ".tar" in each]
    blocks = -(-(remote / "0.tar").stat().st_size // BLOCK_BYTES)
    assert sorted(gets) == sorted(f"GET /photos/tars/{number}.tar" for number in range(3) for _ in range(blocks))
    run(remote, tmp_path / "local", model)
    without = [{key: value for key, value in row.items() if key != "source"} for row in rows(tmp_path / "local")]
    assert [{key: value for key, value in row.items() if key != "source"} for row in rows(tmp_path / "out")] == without


def test_a_tar_of_a_failing_store_is_made_by_the_next_run(remote, s3, tmp_path, model):
    run("s3://photos/tars", tmp_path / "whole", model)
    s3.server.fail("1.tar", "status 503")
    summary = run("s3://photos/tars", tmp_path / "out", model)
    assert (summary.rows, summary.missing, len(summary.unmade)) == (12, 1, 1)
    s3.server.faults.clear()
    run("s3://photos/tars", tmp_path / "out", model)
    assert table(tmp_path / "out") == table(tmp_path / "whole")
