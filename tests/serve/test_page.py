"""The page in a real browser: what a person does, with mouse and keyboard, in light and dark, offline."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands.test_chat_command import make_folder
from helpers.servers import add_steps, serving
from playwright.sync_api import Browser, Page, expect, sync_playwright

from internlm.config.schema import Config
from internlm.monitor.run_file import StartedRun, write_run_file
from internlm.serve.app import create_app, create_run_app
from internlm.serve.engine_thread import EngineThread
from internlm.serve.language_model import load_language_model
from internlm.serve.run_folder import RunFolder
from internlm.serve.served_model import ServedModel, ServedModels, ServerSettings

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")

KEY = "secret"
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("page") / "run"
    add_steps(run, range(1, 31))
    model = {"vocab_size": 64, "hidden_size": 32, "num_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    data = {"seq_len": 16, "micro_bsz": 1, "micro_num": 4, "total_steps": 9}
    config = {"model_type": "INTERNLM2", "model": model, "data": data, "parallel": {"pipeline": {"size": 2}}}
    write_run_file(run, StartedRun(Config.model_validate({"JOB_NAME": "tiny", **config}), 4))
    return run


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Iterator[int]:
    """Three models: two that are equal, and another one without a chat template; a key."""
    folder = make_folder(tmp_path_factory.mktemp("page_models"))
    engines = [EngineThread(load_language_model(str(folder / "run"), device="cpu"), max_length=128) for _ in range(3)]
    with torch.no_grad():
        for parameter in engines[2].language.model.parameters():  # type: ignore[attr-defined]
            parameter *= 1.5
    template = engines[0].language.chat_template()
    models = [
        ServedModel(engine, name, template if name != "other" else None)
        for name, engine in zip(("first", "same", "other"), engines, strict=True)
    ]
    with serving(create_app(ServedModels(models, ServerSettings(api_key=KEY)), RunFolder(run))) as port:
        yield port
    for engine in engines:
        engine.close()


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, port: int) -> Iterator[Open]:
    """Opens the page with its key; fails if something went wrong in it, or if it asked another host for anything."""
    contexts = []
    problems: list[str] = []

    def open_page(tab: str = "", own_port: int = port, key: str | None = KEY, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(20_000)
        if key is not None:
            context.add_init_script(f"sessionStorage.setItem('internlm-key', '{key}')")
        address = f"http://127.0.0.1:{own_port}/"

        def check(route: Any) -> None:
            if route.request.url.startswith(address):
                route.continue_()
            else:
                problems.append(f"asked for {route.request.url}")
                route.abort()

        context.route("**/*", check)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        page.goto(f"{address}#{tab}")
        return page

    expect.set_options(timeout=20_000)
    yield open_page
    for context in contexts:
        context.close()
    assert not problems


def set_number(page: Page, pane: str, name: str, value: object) -> None:
    page.fill(f"#{pane} [name={name}]", str(value))


def test_a_completion_shows_probabilities_to_mouse_and_keyboard(open_page: Open) -> None:
    page = open_page("complete")
    page.fill("#complete-prompt", "some")
    set_number(page, "complete", "max_tokens", 12)
    page.check("#complete [name=echo]")
    page.press("#complete-prompt", "Control+Enter")
    card = page.locator("#token-card")
    expect(page.locator("#complete .status")).to_contain_text("ended: limit of new tokens")
    expect(page.locator("#complete .answer")).to_contain_text("some")
    tokens = page.locator("#complete .answer .token")
    assert tokens.nth(0).inner_text() == "o", "the first token of the prompt has no probability"
    tokens.nth(1).hover()
    expect(card).to_be_visible()
    assert "%" in card.inner_text() and card.locator("tr").count() >= 3
    page.focus("#complete-prompt")
    page.keyboard.press("Escape")
    expect(card).to_be_hidden()
    tokens.nth(0).focus()
    expect(card.locator(".chosen")).to_contain_text("o")
    page.keyboard.press("ArrowRight")
    expect(card.locator(".chosen")).to_contain_text("m")


def test_a_completion_repeats_with_the_seed_that_it_names(open_page: Open) -> None:
    page = open_page("complete")
    page.fill("#complete-prompt", "some")
    set_number(page, "complete", "max_tokens", 40)
    texts = []
    for _ in range(2):
        page.click("#complete .send")
        expect(page.locator("#complete .send")).to_be_enabled()
        expect(page.locator("#complete .status")).to_contain_text("ended")
        texts.append(page.locator("#complete .answer").text_content())
        seed = page.locator("#complete .status").inner_text().split("seed ")[1].split(",")[0]
        set_number(page, "complete", "seed", seed)
    assert texts[0] == texts[1] and texts[0]


def test_a_refused_request_is_told(open_page: Open) -> None:
    page = open_page("complete")
    page.fill("#complete-prompt", "some")
    set_number(page, "complete", "max_tokens", 1000)
    page.click("#complete .send")
    expect(page.locator("#complete .status")).to_contain_text("are more than the 128")


def test_a_chat_goes_on_and_models_without_a_template_say_so(open_page: Open) -> None:
    page = open_page("chat")
    set_number(page, "chat", "max_tokens", 4)
    for number, text in enumerate((HOSTILE, "two")):
        page.fill("#chat-input", text)
        page.press("#chat-input", "Enter")
        expect(page.locator("#chat .messages li")).to_have_count(2 * number + 2)
        expect(page.locator("#chat .send")).to_be_enabled()
    assert HOSTILE in page.locator("#chat .messages li").nth(0).inner_text()
    page.select_option("#chat [name=model]", "other")
    expect(page.locator("#chat .reason")).to_contain_text("--chat-template")
    expect(page.locator("#chat .send")).to_be_disabled()
    page.click("#chat .clear")
    expect(page.locator("#chat .messages li")).to_have_count(0)


def test_equal_checkpoints_give_equal_texts_at_one_seed(open_page: Open) -> None:
    page = open_page("compare")
    page.fill("#compare-prompt", "some")
    set_number(page, "compare", "max_tokens", 40)
    status = page.locator("#compare form > .status")
    page.click("#compare .send")
    expect(status).to_have_text("The texts are equal at this seed: 40 tokens.")
    page.select_option("#compare [name=right]", "other")
    page.click("#compare .send")
    expect(status).to_contain_text("The texts differ")
    expect(page.locator("#compare .different")).to_have_count(2)


def test_what_a_model_writes_is_text(open_page: Open) -> None:
    """Tokens, alternatives and names of curves are never markup."""
    page = open_page("complete")
    token = {"tokens": [HOSTILE], "token_logprobs": [-1.0], "top_logprobs": [{HOSTILE: -1.0, "</td><b>": -2.0}]}
    choice = {"index": 0, "text": HOSTILE, "logprobs": token, "finish_reason": "stop"}
    body = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    page.route("**/v1/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    page.fill("#complete-prompt", "x")
    page.click("#complete .send")
    expect(page.locator("#complete .answer")).to_have_text(HOSTILE)
    page.locator("#complete .token").first.hover()
    expect(page.locator("#token-card")).to_contain_text("<img·src=x")
    assert page.locator("img").count() == 0 and page.locator("#token-card b").count() == 0


def test_a_curve_grows_with_its_file(open_page: Open, tmp_path: Path) -> None:
    run = tmp_path / "run"
    add_steps(run, range(1, 11), **{HOSTILE: 1.0})
    with serving(create_run_app(RunFolder(run), None)) as port:
        page = open_page(own_port=port)
        expect(page.get_by_role("tab")).to_have_count(1)
        expect(page.locator("#run .status")).to_contain_text("step 10 ")
        loss = page.locator("figure", has_text="loss").first
        expect(loss).to_have_attribute("aria-label", f"loss, {5 / 11:.5g} at step 10; arrow keys read it")
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 11, "lo')
            file.flush()
            page.wait_for_timeout(2500)
            expect(page.locator("#run .status")).to_contain_text("step 10 ")
            file.write('ss": NaN}\n')
        expect(page.locator("#run .status")).to_contain_text("step 11 ")
        expect(page.locator("#run .status")).to_contain_text(re.compile(r"written \d s ago"))
        written = time.time() - 90_000
        os.utime(run / "metrics.jsonl", (written, written))
        expect(page.locator("#run .status")).to_contain_text("written 25 h ago")
        expect(loss).to_contain_text("not finite: 1 × nan")
        loss.focus()
        page.keyboard.press("Home")
        expect(loss.locator(".caption")).to_have_text("step 1: 2.5")
        page.select_option("[name=axis]", "tokens")
        page.check("[name=log]")
        page.keyboard.press("Tab")
        loss.focus()
        page.keyboard.press("Home")
        expect(loss.locator(".caption")).to_have_text("tokens 64: 2.5")
        add_steps(run, [5])
        expect(page.locator("#run .notices")).to_contain_text("steps were trained again: 7 lines are superseded")
        page.click(".picker summary")
        page.get_by_label(HOSTILE).check()
        expect(page.locator("figure .name", has_text=HOSTILE)).to_be_visible()
        assert page.locator("img").count() == 0
        page.click(".show-layout")
        expect(page.locator(".layout-body")).to_contain_text("run.json' does not exist")


def test_layout_and_timeline_of_a_run(open_page: Open) -> None:
    page = open_page("run", color_scheme="dark")
    page.click(".show-layout")
    timeline = page.locator(".timeline")
    expect(timeline).to_contain_text("2 pipeline rank(s), 4 micro-batch(es), 20.0 % bubble")
    expect(page.locator(".layout-body")).to_contain_text("tiny: INTERNLM2 on 4 rank(s)")
    timeline.locator("canvas").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    expect(timeline.locator(".caption")).to_contain_text("rank 1: backward of micro-batch 0, time 2 to 4")
    page.get_by_label("Groups of rank").fill("3")
    page.keyboard.press("Tab")
    expect(page.locator(".layout-body")).to_contain_text("rank 3 is at pipeline 1, data 1")


def test_the_theme_follows_the_system_until_it_is_chosen(open_page: Open) -> None:
    def background(page: Page) -> str:
        return page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")

    light, dark = open_page(color_scheme="light"), open_page(color_scheme="dark")
    assert background(light) == "rgb(247, 247, 245)" and background(dark) == "rgb(19, 22, 25)"
    dark.get_by_label("Switch to the light theme").click()
    assert background(dark) == background(light)
    dark.reload()
    assert background(dark) == background(light)


def test_everything_is_reached_with_the_keyboard(open_page: Open) -> None:
    """From the key to a stopped text, on a narrow screen, without a mouse."""
    page = open_page(key=None, viewport={"width": 400, "height": 700})
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-form")).to_contain_text("This key is wrong")
    page.locator("#key").fill("")
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#tab-complete")).to_have_attribute("aria-selected", "true")
    page.locator("#theme").focus()
    page.keyboard.press("Shift+Tab")
    expect(page.locator("#tab-complete")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#chat")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.locator("#complete-prompt")).to_be_focused()
    page.route("**/v1/completions", lambda route: None)  # never answered
    page.keyboard.type("some")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#complete .stop")).to_be_enabled()
    page.keyboard.press("Escape")
    expect(page.locator("#complete .status")).to_contain_text("ended: stopped by you")
    overflow = page.evaluate("() => document.documentElement.scrollWidth - innerWidth")
    assert overflow <= 0
