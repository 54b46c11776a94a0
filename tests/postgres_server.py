"""A PostgreSQL server of our own for tests: Debian's binaries, a folder in /tmp, no one's data."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

USER, PASSWORD = "keeper", "s3cret-of-the-tests"


def find_binaries() -> Path | None:
    """The folder with initdb and postgres: Debian's newest, or that on the path."""
    debian = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name)
    )
    on_path = [Path(found).parent for name in ("initdb",) if (found := shutil.which(name))]
    for folder in [*reversed(debian), *on_path]:
        if all((folder / name).exists() for name in ("initdb", "postgres")):
            return folder
    return None


def why_no_server() -> str | None:
    """Say why no server can be started here, or None."""
    if find_binaries() is None:
        return "no PostgreSQL server is installed (Debian: apt-get install postgresql)"
    if os.geteuid() == 0 and (_other_user() is None or shutil.which("setpriv") is None):
        return "PostgreSQL refuses root, and there is no user postgres or nobody, or no setpriv"
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        return f"psycopg is not usable ({error})"
    return None


class PostgresServer:
    """One server on a free port of 127.0.0.1 (with password) and on a socket (without)."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dist-dp-pg-"))
        binaries = find_binaries()
        assert binaries is not None
        self._binaries = binaries
        self._as_user: list[str] = []
        if os.geteuid() == 0:
            user = _other_user()
            assert user is not None
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self._as_user = [
                "setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"
            ]  # fmt: skip
        (self.folder / "password").write_text(PASSWORD)
        (self.folder / "password").chmod(0o644)
        self._run(
            "initdb", "-D", self.data, "-U", USER, "--no-sync", "--no-instructions",
            "--encoding=UTF8", "--locale=C", "--auth-local=trust", "--auth-host=scram-sha-256",
            f"--pwfile={self.folder / 'password'}",
        )  # fmt: skip
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: subprocess.Popen[bytes] | None = None
        self._databases = 0
        self.start()

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def start(self, *settings: str) -> None:
        """Start it and wait until it answers."""
        options = [
            "-c", "listen_addresses=127.0.0.1", "-c", f"port={self.port}",
            "-c", f"unix_socket_directories={self.folder}", "-c", "max_connections=60",
            "-c", "shared_buffers=16MB",
        ]  # fmt: skip
        for setting in settings:
            options += ["-c", setting]
        command = [*self._as_user, str(self._binaries / "postgres"), "-D", str(self.data)]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *options], stdout=log, stderr=log, cwd="/", start_new_session=True
            )
        # Should these tests be killed, the end of the pipe ends the server and removes its folder.
        self._watch = subprocess.Popen(
            ["sh", "-c", 'read _; kill -QUIT "$0"; sleep 1; rm -rf "$1"', str(self._process.pid),
             str(self.folder)],
            stdin=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(Exception):
                return self.sql("SELECT 1")
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / "server.log").read_text()[-2000:])
            time.sleep(0.05)

    def stop(self, *, at_once: bool = False) -> None:
        """Stop it: in order, or as a crash would."""
        import signal

        if self._watch is not None and self._watch.stdin is not None:
            self._watch.kill()
            self._watch.wait()
            self._watch.stdin.close()
            self._watch = None
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT if at_once else signal.SIGINT)
            self._process.wait(30)
            self._process = None

    def remove(self) -> None:
        self.stop(at_once=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def sql(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """Run a statement as the superuser, in a transaction of its own."""
        import psycopg

        with psycopg.connect(
            host=str(self.folder), port=self.port, user=USER, dbname=database, autocommit=True
        ) as connection:
            cursor = connection.execute(statement)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description else []

    def new_database(self) -> str:
        """The name of a new, empty database."""
        self._databases += 1
        name = f"ledger_{self._databases}"
        self.sql(f"CREATE DATABASE {name}")
        return name

    def socket_url(self, database: str) -> str:
        return f"postgresql://{USER}@/{database}?host={self.folder}&port={self.port}"

    def tcp_url(self, database: str, port: int | None = None) -> str:
        return f"postgresql://{USER}@127.0.0.1:{port or self.port}/{database}"

    def _run(self, name: str, *arguments: str | Path) -> None:
        command = [*self._as_user, str(self._binaries / name), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/")
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr}")


def _other_user() -> pwd.struct_passwd | None:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return None


@contextlib.contextmanager
def running_server() -> Iterator[PostgresServer]:
    server = PostgresServer()
    try:
        yield server
    finally:
        server.remove()
