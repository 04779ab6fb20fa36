"""The pages' generated numbers and tables: what comments ask for, what is left alone, and what is refused."""

import pytest
from click.testing import CliRunner

from smi.dev import evidence
from smi.dev.committed import Committed
from smi.dev.evidence import made, page
from smi.dev.evidence_tables import tables
from smi.errors import InputError
from smi.study.records import write


def a_cell(attack, source, seed, acc, asr, defense="ibau"):
    config = {"domain": "d", "attack": {"name": attack}, "source": source, "defense": {"name": defense}, "seed": seed}
    return {
        "key": f"{attack}{source}{seed}{defense}", "samples_key": f"{attack}{source}{seed}", "config": config, "n": 3,
        "before": {"acc": 0.9, "asr": 1.0}, "seconds": {"repair": 1.0},
        "after": {"acc": acc, "asr": asr, "der": 0.5 + (1 - asr) / 2 - (0.9 - acc) / 2},
    }  # fmt: skip


CHECK = """
domain,architecture,attack,seed,target,source,acc_before,asr_before,floor,acc_after,asr_after,der,signs
d,net,wanet,1,3,smi,90.00,99.00,0.1,85.00,12.00,90.00,3 4
d,net,none,1,,smi,90.00,,,89.00,,,5
d,net,sig,1,2,smi,90.00,99.00,0.1,85.00,18.00,90.00,4
d,net,sig,2,2,smi,90.00,99.00,0.1,85.00,18.00,90.00,
"""


@pytest.fixture
def results(tmp_path):
    cells = [
        a_cell("wanet", "smi", 1, 0.8, 0.5), a_cell("wanet", "smi", 2, 0.7, 0.3),
        a_cell("badnets", "smi", 1, 0.85, 0.0), a_cell("badnets", "clean", 1, 0.9, 0.1),
        a_cell("wanet", "clean", 1, 0.9, 0.1), a_cell("wanet", "clean", 2, 0.9, 0.2),
        a_cell("badnets", "none", 1, 0.6, 0.9, "clp"),
    ]  # fmt: skip
    write(tmp_path / "a.jsonl", cells)
    write(tmp_path / "b.jsonl", cells[:6])
    (tmp_path / "removal_check.csv").write_text(CHECK.lstrip())
    return Committed(tmp_path)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("a.smi.wanet.asr", "40.0"),
        ("a.smi.wanet.asr:0", "40"),
        ("a.smi.asr.max", "50.0"),
        ("a.smi.asr.median", "30.0"),
        ("a.smi.-wanet/2.asr.max", "50.0"),
        ("a.smi.-wanet/1.asr.max", "30.0"),
        ("a.-none+clean.asr.min", "0.0"),
        ("a.smi+clean.badnets.asr", "5.0"),
        ("a.smi.lost", "11.7"),
        ("a.smi.n:0", "3"),
        ("count a.smi", "3"),
        ("minus a.smi.wanet.asr a.clean.wanet.asr", "25.0"),
        ("minus a.clean.asr a.smi.asr", "−13.3"),
        ("most a.smi.asr a.clean.asr", "25.0"),
        ("smaller a.smi.asr a.clean.asr", "1 of 3"),
        ("ahead a.clean a.smi mean", "12.5"),
        ("ahead a.clean a.smi range", "−2.5 to 20.0"),
        ("ahead a.clean a.smi", "12.5 (−2.5 to 20.0)"),
        ("removal_check.smi.-none.asr", "16.0"),
        ("removal_check.none.lost", "1.0"),
        ("named removal_check.-none right", "1"),
        ("named removal_check.-none wrong", "1"),
    ],
)
def test_a_number_is_what_it_says(results, asked, said):
    assert made(results, "n", asked) == said


def test_a_table_has_the_mean_and_the_worst(results):
    first, rule, *lines = made(results, "table", "removals a").splitlines()
    assert first == "| removal | samples | ACC % | ASR % | DER % |"
    assert rule == "|---|---|---|---|---|"
    assert lines[0] == "| I-BAU | clean samples (control) | 90.0 (90.0) | 13.3 (20.0) | 93.3 (90.0) |"
    assert lines[2] == "| CLP | none | 60.0 (60.0) | 90.0 (90.0) | 40.0 (40.0) |"
    beside = made(results, "table", "removals one=a two=a").splitlines()
    assert beside[0] == "| removal | samples | one: ACC % | ASR % | DER % | two: ACC % | ASR % | DER % |"
    assert beside[2].count("13.3 (20.0)") == 2
    sources = made(results, "table", "sources b wanet.asr -wanet.der").splitlines()
    assert sources[0] == "| samples | ACC % | ASR % | DER % | WaNet: ASR % | without WaNet: DER % |"
    assert sources[2] == "| clean samples (control) | 90.0 (90.0) | 13.3 (20.0) | 93.3 (90.0) | 15.0 | 95.0 |"
    assert set(tables) == {"attacked", "attacks", "demo", "forgotten", "removals", "sources"}


PAGE = """# A <b>page</b>

- It is <!-- n: a.smi.wanet.asr -->7<!-- /n --> %, and <!-- n: ahead a.clean a.smi -->12.5
  (−2.5 to 20.0)<!-- /n --> more.

  <!-- table: removals a -->
  old
  <!-- end -->

The end <!-- n: count a -->x<!-- /n -->"""


def test_only_what_is_between_comments_changes_and_lines_may_be_broken_anywhere(results):
    new = page(PAGE, results)
    table = made(results, "table", "removals a").replace("\n", "\n  ")
    assert new == PAGE.replace("-->7<", "-->40.0<").replace("-->x<", "-->7<").replace("  old\n", f"  {table}\n")
    assert page(new, results) == new


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a <!-- n: c.smi.asr -->1<!-- /n -->", r"study 'c'.*Allowed: a, b, removal_check"),
        ("a <!-- n: a.smy.asr -->1<!-- /n -->", r"word 'smy'.*Did you mean 'smi'"),
        ("a <!-- n: a.smi.asrr -->1<!-- /n -->", r"column 'asrr'.*Did you mean 'asr'"),
        ("a <!-- n: a.smi.asr.mx -->1<!-- /n -->", r"word 'asr'"),
        ("a <!-- n: a.smi.asr:x -->1<!-- /n -->", r"invalid literal"),
        ("a <!-- n: a -->1<!-- /n -->", r"column"),
        ("a <!-- n: cuont a.smi -->1<!-- /n -->", r"number 'cuont'.*Did you mean 'count'"),
        ("a <!-- n: count -->1<!-- /n -->", r"argument"),
        ("a <!-- n: ahead a.clean a.none -->1<!-- /n -->", r"3 and 1 removals"),
        ("a <!-- n: ahead a.clean a.smi most -->1<!-- /n -->", r"part 'most'.*both, mean, range"),
        ("<!-- table: removal a -->\n<!-- end -->", r"table 'removal'.*Did you mean 'removals'"),
        ("a <!-- table: removals a -->\n<!-- end -->", "lines of their own"),
        ("<!-- n: a.smi.asr -->1<!-- /n -->", "ends the paragraph"),
        ("- <!-- n: a.smi.asr -->1<!-- /n -->", "ends the paragraph"),
        ("a <!-- n: a.smi.asr -->1\n<!-- /n -->", "ends the paragraph"),
        ("a <!-- n: a.smi.asr -->1", "Allowed: `<!-- n: NUMBER -->"),
        ("a <!-- n: a.smi.asr -->1<!-- end -->", "Allowed: `<!-- n: NUMBER -->"),
        ("a <!-- n: a.smi.asr -->1 <!-- n: a.smi.acc -->2<!-- /n -->", r"<!-- n: a.smi.asr --> is no comment"),
        ("a <!-- n: a.smi.asr ->1", "is no comment of a number or a table"),
        ("a <!-- n: a.smi.asr -->1<!-- /n ->", "is no comment of a number or a table"),
        ("<!-- table: forgotten a -->\n<!-- end -->", "'solver'"),
        ("a <!-- note -->", "is no comment of a number or a table"),
        ("a <!-- n: -->1<!-- /n -->", "is no comment of a number or a table"),
    ],
)
def test_a_bad_comment_is_named_with_its_line_and_what_is_allowed(results, text, message):
    with pytest.raises(InputError, match=f"README.md, line 3: (?s:.*){message}"):
        page(f"one\n\n{text}", results, "README.md")


def test_the_command_writes_and_checks(results, tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text("It is <!-- n: a.smi.wanet.asr -->7<!-- /n --> %.\n")
    for name, value in {"ROOT": tmp_path, "RESULTS": ".", "PAGES": ["page.md"]}.items():
        monkeypatch.setattr(evidence, name, value)
    run = lambda *options: CliRunner().invoke(evidence.main, options)  # noqa: E731
    found = run("--check")
    assert found.exit_code == 1
    assert "-It is <!-- n: a.smi.wanet.asr -->7<!-- /n --> %." in found.output
    assert "+It is <!-- n: a.smi.wanet.asr -->40.0<!-- /n --> %." in found.output
    assert "wrote page.md" in run().output
    found = run("--check")
    assert (found.exit_code, found.output) == (0, "")
    (tmp_path / "page.md").write_text("It is <!-- n: b -->7<!-- /n --> %.\n")
    found = run("--check")
    assert found.exit_code == 1
    assert "page.md, line 1" in found.output


def test_one_seed_is_shown_attack_by_attack(tmp_path):
    cells = [a_cell("wanet", source, 1, 0.8, 0.5) for source in ("clean", "smi", "latent", "public", "none")]
    write(tmp_path / "a.jsonl", cells)
    shown = made(Committed(tmp_path), "table", "attacks a").splitlines()
    assert shown[2] == "| wanet | 90.0 / 100.0" + 5 * " | 80.0 / 50.0" + " |"
    write(tmp_path / "a.jsonl", cells[1:])
    with pytest.raises(InputError, match="has not one row of each attack and source"):
        made(Committed(tmp_path), "table", "attacks a")
