"""One process of a team by itself: what it shows."""

from rich.console import Console

from vitreous.team import Team


def test_only_the_first_has_the_terminal(monkeypatch):
    """The others' consoles are none even on a terminal, where a live table would swallow what they write to stderr."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console()
    assert console.is_terminal
    assert Team(0, 2).console(console) is console
    other = Team(1, 2).console(console)
    assert other.quiet
    assert not other.is_terminal
