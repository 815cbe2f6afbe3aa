"""docs/performance.md has what the command writes, and a newer release of a peer is noticed."""

from packaging.version import Version

from benchmarks import peers


def test_the_page_is_what_the_command_writes():
    assert peers.PAGE.read_text() == peers.page()


def test_a_newer_release_is_listed_and_fails(monkeypatch, capsys):
    read = {peer.distribution: Version(peer.version) for peer in peers.PEERS}
    monkeypatch.setattr(peers, "newest", read.__getitem__)
    assert peers.main(["--check"]) == 0
    read["trl"] = Version("99.0")
    assert peers.main(["--check"]) == 1
    assert capsys.readouterr().out.endswith("trl 99.0 is out; the page has read 1.16.0\n")
