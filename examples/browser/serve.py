"""Serve the page, a saved model and onnxruntime-web on this machine.

    npm install --prefix examples/browser       # onnxruntime-web, once
    python examples/browser/serve.py FOLDER     # FOLDER: sc.save of an exported model

Any other server does too. This one also sends the two headers without which browsers give
WebAssembly a single thread.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent
PACKAGE = "node_modules/onnxruntime-web/dist"
MANIFEST = "samcompress.json"


class Handler(SimpleHTTPRequestHandler):
    """Three folders under one address.

    Args:
        folders: beginning of an address to the folder it stands for; the first that fits counts.
    """

    extensions_map = {  # noqa: RUF012
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *args: Any, folders: dict[str, Path], **kwargs: Any) -> None:
        self.folders = folders
        super().__init__(*args, **kwargs)

    def translate_path(self, path: str) -> str:
        start = next(start for start in self.folders if path.startswith(start))
        self.directory = str(self.folders[start])
        return super().translate_path(path[len(start) - 1 :])

    def list_directory(self, path: Any) -> None:
        self.send_error(404, "File not found")

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_request(self, *args: Any) -> None:
        """Only errors are told."""


def server(
    model: Path | None, runtime: Path, *, host: str = "127.0.0.1", port: int = 8000
) -> ThreadingHTTPServer:
    """A server that has not started.

    Args:
        model: folder of the model; None for the page alone, which then asks for one.
        runtime: onnxruntime-web's ``dist``.
        host: where to listen; "0.0.0.0" for other machines too.
        port: 0 for any that is free.
    """
    folders = {f"/{PACKAGE}/": runtime, "/": PAGE}
    if model is not None:
        folders = {"/model/": model, **folders}
    return ThreadingHTTPServer((host, port), partial(Handler, folders=folders))


def find_runtime() -> Path | None:
    """onnxruntime-web's ``dist``: what SAMCOMPRESS_ORT_WEB says, here, or where one stands."""
    told = os.environ.get("SAMCOMPRESS_ORT_WEB")
    folders = [Path(told)] if told else [PAGE / PACKAGE, Path.cwd() / PACKAGE]
    return next((folder for folder in folders if any(folder.glob("ort.*.mjs"))), None)


def main() -> None:
    """Read the command line and serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="folder of an exported model")
    parser.add_argument("--runtime", type=Path, help="folder of onnxruntime-web's files (dist)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to open it on a phone")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    if options.model and not (options.model / MANIFEST).is_file():
        parser.error(f"no {MANIFEST} in {options.model}; sc.save(exported, folder) writes one")
    runtime = options.runtime or find_runtime()
    if runtime is None or not any(runtime.glob("ort.*.mjs")):
        parser.error("no onnxruntime-web; npm install --prefix examples/browser, or --runtime")
    try:
        serving = server(options.model, runtime, host=options.host, port=options.port)
    except OSError as err:
        parser.error(f"port {options.port} of {options.host}: {err.strerror}; try --port")
    with serving:
        print(f"http://{options.host}:{serving.server_port}/  (Ctrl-C ends it)", flush=True)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
