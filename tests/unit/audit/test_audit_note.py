"""Notes, keys and witnesses: what the named key signed is taken; anything else, and any tree that is no continuation, is not."""

from __future__ import annotations

import base64
import json

import pytest
from tree_rig import Log, Memory, leaf, mth

from saw.audit.note import Checkpoint, NoteError, PublicKey, Signer, open_checkpoint, sign_checkpoint
from saw.audit.tiles import TreeError
from saw.audit.witness import WitnessRefusal, cosign
from saw.errors import SawError

pytestmark = pytest.mark.control("AUD-02")

#: The checkpoint and the keys' names of the public specification of cosignatures; its log's signature is of type 1.
EXAMPLE = """\
example.com/behind-the-sofa
20852163
CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=
"""


def test_keys_come_back_from_their_lines_and_damaged_ones_do_not() -> None:
    for kind in (1, 4):
        signer = Signer("trail.example.com/a", kind, b"s" * 32)
        assert Signer.parse(signer.private_line() + "\n").public == signer.public == PublicKey.parse(signer.public.line)
        name, marked, value = signer.public.line.split("+", 2)
        for bad in (
            "",
            name,
            f"{name}+{marked}",
            f"other+{marked}+{value}",
            f"{name}+00000000+{value}",
            f"{name}+{marked}+AAAA",
        ):
            with pytest.raises(NoteError):
                PublicKey.parse(bad)
        with pytest.raises(NoteError):
            Signer.parse(signer.public.line)
        with pytest.raises(NoteError):
            Signer.parse(signer.private_line().replace("trail", "trial"))
    for name in ("", "a b", "a+b", "a\nb"):
        with pytest.raises(NoteError):
            Signer(name, 1, b"s" * 32)


def test_a_checkpoint_has_the_form_of_the_specification() -> None:
    root = base64.b64decode("CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=")
    signer = Signer("example.com/behind-the-sofa", 1, b"k" * 32)
    note = sign_checkpoint(Checkpoint("example.com/behind-the-sofa", 20852163, root), signer)
    text, _, line = note.partition("\n\n")
    assert text + "\n" == EXAMPLE
    assert line.startswith("— example.com/behind-the-sofa ")
    assert base64.b64decode(line.split()[2])[:4] == signer.public.id
    opened = open_checkpoint(note.encode(), signer.public)
    assert (opened.checkpoint.size, opened.checkpoint.root) == (20852163, root)


def flipped(note: bytes, place: int) -> bytes:
    """The note's last signature line with one bit changed in a byte of its value."""
    mark, name, value = note.splitlines()[-1].split(b" ")
    raw = bytearray(base64.b64decode(value))
    raw[place] ^= 1
    return b" ".join([mark, name, base64.b64encode(bytes(raw))]) + b"\n"


def test_only_what_the_named_key_signed_is_taken() -> None:
    log = Log()
    raw = log.grow([leaf(0), leaf(1)])
    key = log.signer.public
    assert open_checkpoint(raw, key).checkpoint.size == 2
    other = Signer("trail.example.com", 1, b"2" * 32)
    foreign = Signer("other.example.com", 1, b"1" * 32)
    signed = sign_checkpoint(Checkpoint("other.example.com", 2, log.root), log.signer)
    for bad, reason in (
        (raw.replace(b"\n2\n", b"\n3\n"), "is not over this checkpoint"),
        (raw.replace(b"trail.example.com\n2", b"trial.example.com\n2"), "is not over this checkpoint"),
        (raw.replace(b"\n2\n", b"\n2\nmore\n"), "is not over this checkpoint"),
        (sign_checkpoint(Checkpoint(key.name, 2, log.root), other).encode(), "did not sign"),
        (signed.encode(), "this checkpoint is of other.example.com"),
        (sign_checkpoint(Checkpoint(key.name, 2, b"short"), log.signer).encode(), "is no checkpoint"),
        (raw + flipped(raw, -1), "is not over this checkpoint"),
        (raw[: raw.index(b"\n\n") + 2] + flipped(raw, 0), "did not sign"),
        (raw[:-1], "no signed note"),
        (raw.replace(b"\n\n", b"\n"), "no signed note"),
        (raw.replace(b"\n2\n", b"\n2\r\n"), "no signed note"),
        (raw + b"not a signature\n", "no signed note"),
        (b"\xff" + raw, "no signed note"),
        (b"", "no signed note"),
        (b"x" * 70_000 + raw, "no signed note"),
    ):
        with pytest.raises(NoteError, match=reason):
            open_checkpoint(bad, key)
    with pytest.raises(NoteError, match="did not sign"):
        open_checkpoint(raw, foreign.public)
    stranger = raw + foreign.sign(log.signer.public.name).encode()
    assert open_checkpoint(stranger, key).checkpoint.size == 2, "signatures of others are not looked at"


class Witness:
    """A witness with its memory in a file."""

    def __init__(self, folder) -> None:
        self.signer, self.state = Signer("witness.example.com", 4, b"w" * 32), folder / "state.json"

    def sign(self, log, raw, files=None) -> str:
        return cosign(
            raw, log.signer.public, log.files if files is None else files, self.signer, self.state, time=1764399600
        )

    def remembered(self):
        return json.loads(self.state.read_text())["logs"] if self.state.exists() else {}


def test_a_witness_signs_each_continuation_and_its_signature_counts(tmp_path) -> None:
    witness, log = Witness(tmp_path), Log()
    for count in (0, 1, 5, 0, 300):
        raw = log.grow([leaf(log.size + number) for number in range(count)])
        note = witness.sign(log, raw).encode()
        opened = open_checkpoint(note, log.signer.public, (witness.signer.public,))
        assert opened.witnesses == {"witness.example.com": 1764399600}
        assert witness.remembered()[log.signer.public.line]["size"] == log.size
    assert open_checkpoint(raw, log.signer.public, (witness.signer.public,)).witnesses == {}
    for place in (11, -1):  # the time, and the signature
        with pytest.raises(NoteError, match="is not over this checkpoint"):
            open_checkpoint(raw + flipped(note, place), log.signer.public, (witness.signer.public,))


def test_a_witness_signs_no_fork_no_shrunken_tree_no_second_view_and_forgets_nothing(tmp_path) -> None:
    witness, log = Witness(tmp_path), Log()
    early = log.grow([leaf(number) for number in range(4)])
    raw = log.grow([leaf(number) for number in range(4, 10)])
    witness.sign(log, raw)
    known = witness.remembered()
    for leaves, code in (
        ([leaf(number, "x") for number in range(10)], "split_view"),
        ([*(leaf(number) for number in range(8)), leaf(9), leaf(8)], "split_view"),
        ([*(leaf(number) for number in range(9)), leaf(9, "x"), leaf(10)], "tree_forked"),
        ([leaf(number) for number in range(1, 20)], "tree_forked"),
        ([leaf(number) for number in range(9)], "tree_shrunk"),
    ):
        fork = Log()
        with pytest.raises(WitnessRefusal) as refused:
            witness.sign(fork, fork.grow(leaves))
        assert refused.value.code == code
        assert witness.remembered() == known
    with pytest.raises(WitnessRefusal) as refused:
        witness.sign(log, early)
    assert refused.value.code == "tree_shrunk"
    with pytest.raises(NoteError):
        witness.sign(log, Log(seed=b"2" * 32).grow([leaf(number) for number in range(11)]))
    with pytest.raises(TreeError):
        witness.sign(log, log.grow([leaf(10)]), files=Log().files)
    assert witness.remembered() == known
    assert witness.sign(log, log.grow([leaf(11)]))
    assert witness.remembered()[log.signer.public.line]["size"] == 12


def test_a_first_tree_is_taken_only_with_its_tiles_and_a_damaged_memory_is_no_first_time(tmp_path) -> None:
    witness, log = Witness(tmp_path), Log()
    raw = log.grow([leaf(0), leaf(1)])
    other = Log()
    other.grow([leaf(5), leaf(6)])
    with pytest.raises(WitnessRefusal, match="not those of the checkpoint"):
        witness.sign(log, raw, files=other.files)
    assert witness.sign(log, raw)
    witness.state.write_text(witness.state.read_text()[:-3])
    with pytest.raises(SawError, match="is not valid"):
        witness.sign(log, raw)


def test_damaged_tiles_are_damage_and_a_fork_is_one_that_the_tiles_prove(tmp_path) -> None:
    """Old sizes of every form: an empty tree, a power of two, and others; any one hash of any tile is damaged."""
    for old in (0, 1, 4, 5, 300):
        (tmp_path / str(old)).mkdir()
        witness, log, fork = Witness(tmp_path / str(old)), Log(), Log()
        witness.sign(log, log.grow([leaf(number) for number in range(old)]))
        raw = log.grow([leaf(old + number) for number in range(7)])
        codes = set()
        for name in [name for name in log.files if name.startswith("tile/") and "/entries/" not in name]:
            for place in range(0, len(log.files[name]), 32):
                raw_tile = log.files[name]
                damaged = {**log.files, name: raw_tile[:place] + b"x" * 32 + raw_tile[place + 32 :]}
                try:
                    witness.sign(log, raw, files=Memory(damaged))
                except WitnessRefusal as error:
                    codes.add(error.code)
                    continue
                witness.state.write_text(json.dumps({"logs": {log.signer.public.line: _seen(old, log)}}))
        assert codes == {"tiles_differ"}, old
        if old:
            with pytest.raises(WitnessRefusal) as refused:
                witness.sign(fork, fork.grow([leaf(number, "x") for number in range(old + 7)]))
            assert refused.value.code == "tree_forked"
        assert witness.sign(log, raw)


def _seen(old: int, log: Log) -> dict[str, object]:
    return {"size": old, "root": mth([leaf(number).raw for number in range(old)]).hex()}
