"""The race games on the built pages: won, lost and walked to the end by keyboard, always as the package says."""

from __future__ import annotations

import json
import random
import re

import pytest
from playwright.sync_api import expect

from mmu import protocols
from mmu.board import board
from mmu.program import Program, edit
from mmu.today import RACES
from mmu.widgets import IdFieldPlayer

from .conftest import SAID, SITE, played
from .test_pages import PAGES

FLAGS = """
word flag0
word flag1
word in0
word in1
left:
    A0  flag0 = 1
    A1  if flag1: done
    A2  mark in0 = 1
right:
    B0  flag1 = 1
    B1  if flag0: done
    B2  mark in1 = 1
oops: in0 and in1
"""
PLAN = edit(
    protocols.SEED_2012,
    {"F1": None, "F2": None, "F4": "cmpxchg spte: (w=0) -> (w=1)", "W3": "if not spte.w: W5", "W4": "xchg spte: (w=0)"},
).replace("w, id(vcpu)", "w")
W_ONLY = edit(RACES["two-bits"].text, {"P2": "old = spte; if not old.w: P4"})
THREE = [["fault"], ["protect"], ["fault"]]
THEN = (
    protocols.SEED_2012
    + """
protect_then_fault:
    W0  take lock
    W1  wp = 1
    W2  smp_mb
    W3  if not (spte.w or spte.id): W5
    W4  xchg spte: (w=0, id=0)
    W5  release lock
    F0  if spte.w: done
    F1  spte.id = me
"""
)
WON = {  # name: page, program, memory
    "free-under": ("05-walk-and-free", protocols.program("walk-none", "seed", 2), "SC"),
    "walk-no-mb": ("05-walk-and-free", protocols.program("walk-mode", "no-fault-mb", 2), "TSO"),
    "flags-tso": ("06-store-buffers", Program(FLAGS, [["left"], ["right"]]), "TSO"),
    "no-fault-mb": ("06-store-buffers", protocols.program("one-shot", "no-fault-mb", 2), "TSO"),
    "no-id": ("07-cmpxchg", Program(PLAN, [["fault"], ["protect"]]), "SC"),
    "w-only": ("08-identification", protocols.program("one-shot", "protector-w-only", 2), "SC"),
    "zap-rmw": ("08-identification", protocols.program("zap", "rmw-id", 2), "SC"),
    "flush-read": ("08-identification", protocols.program("flush", "seed", 2), "SC"),
    "shared-id": ("09-unique-ids", Program(protocols.SEED_2012, THREE, marks=[1, 1, 1]), "SC"),
    "two-suffice": ("09-unique-ids", Program(THEN, [["fault"], ["protect_then_fault"]], marks=[1, 1]), "SC"),
    "gfn-aba": ("09-unique-ids", protocols.program("gfn-aba", "seed", 2), "SC"),
    "wrapped": ("10-what-ids-cost", protocols.program("one-shot", "wrapped-id", 3), "SC"),
    "two-bits-w-only": ("12-what-became", Program(W_ONLY, [["fault"], ["protect"]]), "SC"),
    "gfn-merged": ("12-what-became", protocols.program("gfn-aba", "merged", 2), "SC"),
    "lost-dirty": ("12-what-became", RACES["lost-dirty"].program(), "SC"),
    "late-flush": ("12-what-became", RACES["late-flush"].program(), "SC"),
}
NEVER = {
    "walk-mode": ("05-walk-and-free", protocols.program("walk-mode", "seed", 3), "TSO"),
    "flags-sc": ("06-store-buffers", Program(FLAGS, [["left"], ["right"]]), "SC"),
    "seed": ("08-identification", protocols.program("one-shot", "seed", 3), "TSO"),
    "unique-id": ("09-unique-ids", Program(protocols.SEED_2012, THREE), "SC"),
    "merged": ("10-what-ids-cost", protocols.program("merged", "seed", 2), "TSO"),
    "two-bits": ("12-what-became", RACES["two-bits"].program(), "TSO"),
}
DRAIN = "qwe"


class Game:
    """One race player on an open page, at its start, and what the package knows about it."""

    def __init__(self, kept, name, width=1200):
        page_name, program, memory = {**WON, **NEVER}[name]
        self.board = board(program, memory)
        self.page = kept(f"book/{page_name}.html", width)
        twins = self.page.locator('.mmu-player[data-player="race"]')
        names = twins.locator("script").evaluate_all("all => all.map(data => JSON.parse(data.textContent).name)")
        self.el = twins.nth(names.index(name))
        self.state = self.el.locator(".mmu-state")
        self.el.locator(".mmu-race").focus()
        self.page.keyboard.press("r")
        self.expect([])

    def keys(self, code, here=0):
        """A move's keys: a digit, and a letter behind it where that vCPU has the choice of a path in this state."""
        actor = code[0]
        if code.endswith("d"):
            return [DRAIN[int(actor)]]
        begins = [move for move in self.board.moves[here] if f"{move.actor}" == actor and move.kind != "drain"]
        if len(begins) <= 1:
            return [actor]
        path = self.board.machine.program.actors[int(actor)][int(code.partition(".")[2] or 0)]
        return [actor, {"fault": "f", "log": "l", "protect": "p", "unprotect": "n"}[path]]

    def press(self, code, here=0, shift=False):
        """Press a move's keys; a drain is the digit with Shift too."""
        for key in [f"Shift+Digit{code[0]}"] if shift and code.endswith("d") else self.keys(code, here):
            self.page.keyboard.press(key)

    def said(self):
        """What the player says now."""
        return self.state.text_content()

    def shown(self, path):
        """What the player must say after these moves, up to the words about the end."""
        state = self.board.states[path[-1].target if path else 0]
        told = f"Move {len(path)}. vCPU {path[-1].actor}: {path[-1].text}." if path else "At the start."
        return f"{told} {self.board.machine.show(state)}."

    def expect(self, path):
        assert self.shown(path) in self.said()


@pytest.mark.parametrize("name", WON, scope="module")
def test_each_level_is_won_by_its_shortest_schedule(kept, name):
    """The package's shortest schedule, pressed key by key, ends in OOPS; only then is the shortest way named."""
    game = Game(kept, name, width=390)
    path = game.board.shortest()
    for number, move in enumerate(path, 1):
        assert not re.search("OOPS|short", game.said())
        game.press(move.code, shift=number % 2 == 0)
        game.expect(path[:number])
    assert f"You needed {len(path)} moves; there is no shorter way." in game.said()
    assert game.state.get_attribute("data-ended") == "oops"
    game.page.keyboard.press("0")  # a won game stands still
    assert "OOPS" in game.said()
    game.page.keyboard.press("u")
    game.expect(path[:-1])
    game.page.keyboard.press("ArrowRight")
    game.expect(path)
    game.page.keyboard.press("r")
    game.expect([])


SEEN = """el => [
  el.querySelector(".mmu-state").textContent,
  [...el.querySelectorAll("button")].some(b => b.textContent.startsWith("Step back") && b.checkVisibility()),
]"""


@pytest.mark.parametrize("name", [*WON, *NEVER], scope="module")
def test_any_keys_show_the_packages_state(kept, name):
    """After any keys, possible or not, the player shows the package's move, shared words and dead end."""
    game = Game(kept, name)
    back = game.el.evaluate("""el => [...el.querySelectorAll("button")].findIndex(
      button => button.textContent.startsWith("Step back"))""")
    rng = random.Random(name)
    actors = len(game.board.machine.actors)
    begun = sorted({move.code for moves in game.board.moves for move in moves if "." in move.code})
    path, moves, told = [], [], []  # told: after each of the moves, what must be said, and whether all is lost and over
    for _ in range(30):
        code = rng.choice([f"{actor}{drain}" for actor in range(actors) for drain in ("", "", "d")] + begun + ["u"])
        here = path[-1].target if path else 0
        if code == "u":
            path = path[:-1]
            keys, shown = ["u"], game.shown(path)
        else:
            move = next((move for move in game.board.moves[here] if move.code == code), None)
            if "." in code and not move:
                continue  # no such choice here
            keys = game.keys(code, here)
            moved = move and not any(game.board.oops[done.target] for done in path)
            path = path + [move] * bool(moved)
            here = path[-1].target if path else 0
            shown = game.shown(path) if moved else game.board.machine.show(game.board.states[here])
        here = path[-1].target if path else 0
        lost = name in WON and game.board.left[here] < 0
        dead = lost and bool(game.board.moves[here])
        moves += keys
        told += [(f"vCPU {key} chooses: F fault, ", None, None) for key in keys[:-1]] + [(shown, lost, dead)]
        if dead and rng.random() < 0.5:
            while path and game.board.left[path[-1].target] < 0:
                path = path[:-1]
            moves.append(("button", back))
            told.append((game.shown(path), False, False))
    heard = played(game.el, moves, SEEN)
    for move, (shown, lost, dead), (text, offered) in zip(moves, told, heard, strict=True):
        assert shown in text, move
        if lost is not None:
            assert (offered, "From here OOPS can no longer happen" in text) == (lost, dead), move


@pytest.mark.parametrize("name", NEVER, scope="module")
def test_the_page_walks_an_unwinnable_level(kept, name):
    """The browser visits as many states by as many moves as the package counts, and finds OOPS in none."""
    game = Game(kept, name)
    game.el.get_by_role("button", name="Let my browser walk every state").click()
    moves = sum(map(len, game.board.moves))
    expect(game.el.locator(".mmu-proof")).to_have_text(
        f"Your browser has visited {len(game.board.states):,} states by {moves:,} moves and found OOPS in none of "
        "them. No schedule breaks this protocol."
    )


def test_a_letter_alone_needs_no_digit_where_one_vcpu_can_begin(kept):
    """A path's letter begins it if one vCPU can, and asks for the digit if both can."""
    game = Game(kept, "merged")
    game.page.keyboard.press("p")
    expect(game.state).to_contain_text("Which vCPU is to protect? Press its digit first.")
    path = game.board.play("0.2")
    game.press("0.2")
    game.expect(path)
    game.page.keyboard.press("f")  # vCPU 0 has begun: only the other has a choice
    game.expect(game.board.play("0.2 1"))


@pytest.mark.parametrize("name", ["lost-dirty", "zap-rmw", "merged"])
def test_a_program_can_be_read_beside_its_game(kept, name):
    """Each game's program unfolds by keyboard, with its comments, and without the paths that nobody runs."""
    game = Game(kept, name, width=390)
    game.el.locator("summary").focus()
    game.page.keyboard.press("Enter")
    listing = game.el.locator(".mmu-program pre")
    expect(listing).to_be_visible()
    program = game.board.machine.program
    text, run = listing.text_content(), {path for paths in program.actors for path in paths}
    assert "#" in text
    for path, steps in program.paths[0].items():
        assert path in run
        assert all(f"{step.label}" in text for step in steps)
    assert set(re.findall(r"^(\w+):", text, re.MULTILINE)) - {"oops"} == run
    game.page.keyboard.press("0")  # keys still play the game
    expect(game.state).not_to_contain_text("At the start")


def test_the_walk_judges_by_itself(kept):
    """On a level that was won the browser's own walk finds as many broken states as the package."""
    game = Game(kept, "shared-id")
    for move in game.board.shortest():
        game.press(move.code)
    game.el.get_by_role("button", name="Let my browser walk every state").click()
    bad = int(game.board.oops.sum())
    expect(game.el.locator(".mmu-proof")).to_contain_text(f"{len(game.board.states)} states by")
    expect(game.el.locator(".mmu-proof")).to_contain_text(f"found OOPS in {bad} of them.")


def test_a_longer_win_is_shown_the_shortest(kept):
    """Who wins in more moves than needed is told how many are needed, and can have them played."""
    game = Game(kept, "shared-id")
    least = len(game.board.shortest())
    here, path = 0, []
    while not game.board.oops[here]:  # the longest detour that still wins
        options = [move for move in game.board.moves[here] if game.board.left[move.target] >= 0]
        move = max(options, key=lambda move: game.board.left[move.target])
        path.append(move)
        here = move.target
        game.press(move.code)
    assert len(path) > least
    expect(game.state).to_contain_text(f"You needed {len(path)} moves; the shortest way takes {least}.")
    game.el.get_by_role("button", name="Play the shortest").click()
    for _ in range(least):
        game.page.keyboard.press("ArrowRight")
    game.expect(game.board.shortest())


@pytest.mark.parametrize(("name", "code"), [("shared-id", "0,0,0,0,1,1"), ("no-fault-mb", "0,0,0,1,1,1d")])
def test_a_link_replays_a_schedule(kept, name, code):
    """A link with a schedule shows the state that the schedule leads to, and the game offers the same link."""
    game = Game(kept, name)
    game.page.evaluate("fragment => { location.hash = fragment }", f"#race-{name}={code}")
    path = game.board.play(code)
    game.expect(path)
    assert game.el.locator(".mmu-link").get_attribute("href") == f"#race-{name}={code}"


def test_every_counterexample_of_the_gallery_replays(kept):
    """In the gallery the right arrow key plays each counterexample to its OOPS, and each has a link that replays it."""
    page = kept("book/gallery.html")
    players = page.locator('.mmu-player[data-player="race"]').all()
    links = page.locator(".mmu-index a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
    assert len(players) == len(links) > 20
    done = set()
    for player, link in zip(players, links, strict=True):
        data = json.loads(player.locator("script").text_content())
        assert link == f"#race-{data['name']}={','.join(data['line'])}"
        player.locator(".mmu-race").evaluate("game => game.focus({ preventScroll: true })")  # a scroll draws the page
        end = played(player, ["ArrowRight"] * len(data["line"]), SAID, done)[-1]
        assert f"Move {len(data['line'])}. " in end and "OOPS" in end


def test_a_gallery_link_opens_its_schedule(kept):
    """A click on an entry of the gallery's index shows that counterexample at its end."""
    page = kept("book/gallery.html")
    page.locator(".mmu-index a", has_text=re.compile("^One mark for all$")).click()
    shown = page.locator(".mmu-race", has_text="One mark for all · SC").first
    expect(shown.locator(".mmu-state")).to_contain_text("Move 13. ")


def test_names_are_unique():
    """No two games of the book share a name, so a link means one game."""
    pages = [(SITE / name).read_text(encoding="utf-8") for name in PAGES]
    names = [name for page in pages for name in re.findall(r'"memory":"\w+","moves":.*?,"name":"([^"]+)"', page)]
    assert len(names) > 30
    assert len(names) == len(set(names))


def test_id_field_player(kept):
    """After any keys the id field's player says what the package makes of a field of that place and width."""
    page = kept("book/10-what-ids-cost.html")
    player = page.locator('.mmu-player[data-player="idfield"]').first
    data = json.loads(player.locator("script").text_content())
    low, width = data["start"]
    player.locator("button").first.focus()
    keys = random.Random(254).choices(["ArrowLeft"] * 3 + ["ArrowRight", "+", "ArrowUp", "-", "u", "r"], k=80)
    past, told = [], []
    for key in keys:
        if key == "u":
            low, width = past.pop() if past else (low, width)
        elif key == "r":
            (low, width), past = data["start"], []
        else:
            wide = max(1, min(12, width + {"+": 1, "ArrowUp": 1, "-": -1}.get(key, 0)))
            place = max(0, min(64 - wide, low + {"ArrowLeft": 1, "ArrowRight": -1}.get(key, 0)))
            if (place, wide) != (low, width):
                past.append((low, width))
            low, width = place, wide
        told.append(" ".join(IdFieldPlayer._state(low, width)))
    assert played(player, keys, SAID) == told
