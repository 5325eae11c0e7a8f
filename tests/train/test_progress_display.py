"""What is seen while it trains: a table on a terminal, plain lines elsewhere, no colour where none is wanted."""

import gc
import io
import re

import pytest
from rich.console import Console

from vitreous.base.metrics import CLASSIFICATION
from vitreous.train import train
from vitreous.train.records.progress_display import ROWS, Shown
from vitreous.train.records.run_folder import read_metrics


def console(**options) -> Console:
    return Console(file=io.StringIO(), width=100, **options)


def text(shown: Console) -> str:
    return shown.file.getvalue()


def test_a_terminal_has_a_table(settings):
    seen = console(force_terminal=True)
    folder = train(settings(epochs=3), seen)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text(seen))
    last = plain[plain.rindex("epoch ") :]
    for name in ("loss", "accuracy: test", "learning rate"):
        assert name in last
    for line in read_metrics(folder):
        assert f"{line['losses']['total']:.4f}" in last
    assert "images/s" not in plain  # the plain lines
    assert all(f"epoch {k}/3" in plain for k in (1, 2, 3))  # the bar


def test_elsewhere_there_are_plain_lines(settings):
    seen = console()
    folder = train(settings(epochs=2), seen)
    assert "\x1b" not in text(seen)
    found = re.findall(r"^epoch (\d)/2  loss ([\d.]+)  test", text(seen), re.M)
    assert found == [(str(line["epoch"]), f"{line['losses']['total']:.4f}") for line in read_metrics(folder)]


def test_no_color_is_heard_on_a_terminal(settings, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    seen = console(force_terminal=True, color_system="standard")
    train(settings(epochs=1), seen)
    colours = [code for code in re.findall(r"\x1b\[([0-9;]*)m", text(seen)) if re.search(r"(^|;)(3|4|9|10)\d", code)]
    assert colours == []


@pytest.mark.parametrize("epochs", [1, ROWS, 3 * ROWS])
def test_the_table_fits_a_small_terminal(epochs):
    made = {"losses": {"total": 1.0}, "tests": {"test": {"accuracy": 0.5}}, "lr": 1e-3, "seconds": 1.0}
    shown = Shown(console(force_terminal=True), epochs, CLASSIFICATION[0])
    shown.epoch([made | {"epoch": k} for k in range(1, epochs + 1)])
    assert shown.table.row_count == min(epochs, ROWS)
    assert list(shown.table.columns[0].cells)[-1] == str(epochs)


def test_a_bar_goes_with_its_epoch_even_if_that_breaks_off():
    shown = Shown(console(), 2, CLASSIFICATION[0])

    def breaks():
        for batch in shown.batches([1, 0], 2, 1):
            assert len(shown.bar.tasks) == 1
            1 / batch

    with pytest.raises(ZeroDivisionError):
        breaks()
    gc.collect()
    assert list(shown.batches([5, 6], 2, 1)) == [5, 6]
    assert shown.bar.tasks == []
