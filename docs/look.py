"""Screenshots of the README's first screen and of the site's start page, into build/look/.

    make docs-check

Fails where there is no Chromium, or a picture shows next to nothing.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import markdown
from PIL import Image

ROOT = Path(__file__).parent.parent
OUT = ROOT / "build" / "look"
STYLE = """
body { font: 16px/1.5 sans-serif; color: #1f2328; max-width: 868px; margin: 32px auto; }
code { font: 13.6px monospace; background: #eff1f3; padding: 2px 5px; border-radius: 6px; }
pre { background: #f6f8fa; padding: 16px; overflow: hidden; }
pre code { background: none; padding: 0; }
table { border-collapse: collapse; font-size: 15px; }
td, th { border: 1px solid #d1d9e0; padding: 6px 13px; }
h1, h2 { border-bottom: 1px solid #d1d9e0; padding-bottom: 8px; }
a { color: #0969da; } img { max-width: 100%; }
"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--window-size=1280,1000", "--virtual-time-budget=5000",
)  # fmt: skip


def readme() -> Path:
    """README.md as a page that looks about as it does where it is read."""
    body = markdown.markdown(
        (ROOT / "README.md").read_text(), extensions=["tables", "fenced_code", "sane_lists"]
    )
    page = OUT / "readme.html"
    base = f'<base href="{ROOT.as_uri()}/">'
    page.write_text(f"<!doctype html><meta charset=utf-8>{base}<style>{STYLE}</style>{body}")
    return page


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def shoot(browser: str, page: str, name: str) -> None:
    picture = OUT / name
    picture.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        places = [f"--user-data-dir={profile}", f"--screenshot={picture}", page]
        subprocess.run([browser, *FLAGS, *places], check=True, capture_output=True, timeout=120)
    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
    if len(colours or []) < 50:
        sys.exit(f"{picture} shows next to nothing")
    print(picture)


def main() -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"no browser: one of {', '.join(BROWSERS)} (Debian: apt-get install chromium)")
    OUT.mkdir(parents=True, exist_ok=True)
    shoot(browser, readme().as_uri(), "readme.png")
    # From a server: the theme hides the search of pages that are files.
    handler = functools.partial(Handler, directory=ROOT / "build" / "site")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        shoot(browser, f"http://127.0.0.1:{server.server_port}/index.html", "start.png")
        server.shutdown()


if __name__ == "__main__":
    main()
