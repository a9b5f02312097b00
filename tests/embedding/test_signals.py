"""Ctrl-C and SIGTERM in real processes; what each signal leaves is in test_command.py."""

import os
import signal
import subprocess
import sys

import psutil

# The main thread sits in one operation of torch, as it does at a large image, and a forked process runs beside it.
BUSY = """
import multiprocessing, sys, time
import torch
from nopad.cli import main
from nopad.encoder import PackedEncoder

def encode(self, *_, **__):
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True).start()
    print("busy", file=sys.stderr, flush=True)
    torch.linalg.svd(torch.randn(6000, 6000))

PackedEncoder.encode = encode
sys.exit(main(sys.argv[1:]))
"""

# Interrupted where dataclasses make their methods, as torch's are while it is imported.
IN_EXEC = """
import argparse, sys
from nopad import cli

def run(options):
    exec("raise KeyboardInterrupt")

class Parser:
    def parse_known_args(self, arguments):
        return argparse.Namespace(command="embed", run=run), []

cli.build_parser = Parser
sys.exit(cli.main([]))
"""


def test_an_interrupt_within_exec_has_the_exit_status_of_others(tmp_path):
    (tmp_path / "interrupted.py").write_text(IN_EXEC)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run([sys.executable, "-m", "interrupted"], env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 130


def lines_until(process: subprocess.Popen, text: str) -> list[str]:
    lines = []
    while not lines or text not in lines[-1]:
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    return lines


def test_third_signal_ends_a_process_in_the_middle_of_an_operation(photos, tmp_path, model):
    command = [sys.executable, "-c", BUSY, "embed", str(photos), "--model", str(model), "--out", str(tmp_path / "out")]
    # A group of its own, which gets the signal as a whole, as from a terminal.
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0)
    lines_until(process, "busy")
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    os.killpg(process.pid, signal.SIGINT)
    lines_until(process, "finishing the shard in hand; a second signal ends with the pack in hand and loses this shard")
    assert all(child.is_running() for child in children)
    process.send_signal(signal.SIGTERM)
    lines_until(process, "ending with the pack in hand; a third signal ends at once")
    process.send_signal(signal.SIGINT)
    last = lines_until(process, "ended at once, the shard in hand is lost, finished ones are kept; to go on: ")[-1]
    assert "nopad embed" in last or "embed" in last.split("to go on: ")[1]
    process.communicate(timeout=60)
    assert process.returncode == 130
    psutil.wait_procs(children, timeout=60)
    assert not any(child.is_running() for child in children)
