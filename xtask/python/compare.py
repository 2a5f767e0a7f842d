"""Times networks in ONNX Runtime, stock tract and scanside in turn: CPU time of one thread, and the outputs compared.

    python compare.py SCANSIDE DIRECTORY ROUNDS NAME...

Ratios are against the better of ONNX Runtime's float and int8. Bits are compared on the QOperator twin, with ONNX Runtime's
graph optimisations off, which change results. See networks.py for the files.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path


def random(count, first):
    """The input of `scanside model bench`: SplitMix64."""
    import numpy as np

    with np.errstate(over="ignore"):
        z = (np.arange(first, first + count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(40)).astype(np.float32) / np.float32(16777216.0) - np.float32(0.5)) * np.float32(3.0)


def open_runtime(file, optimise):
    import numpy as np
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feeds, first = {}, 0
    for tensor in session.get_inputs():
        count = int(np.prod(tensor.shape))
        feeds[tensor.name] = random(count, first).reshape(tensor.shape)
        first += count
    return lambda: session.run(None, feeds)


def serve(file):
    """A process that runs a network once for each line it reads: peers must not share their memory."""
    run = open_runtime(file, True)
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID)
        run()
        ms = (time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID) - start) * 1e3
        rss = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
        print(ms, rss, flush=True)


class Runtime:
    def __init__(self, file):
        command = [sys.executable, __file__, "serve", str(file)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process.stdout.readline()
        self.ms, self.rss = [], 0

    def run(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        ms, rss = self.process.stdout.readline().split()
        self.ms.append(float(ms))
        self.rss = float(rss)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Scanside:
    def __init__(self, binary, file, *options, kernel=None):
        self.command = [binary, "model", "bench", str(file), "--runs", "1", "--json", *options]
        self.environment = dict(os.environ, **({"SCANSIDE_KERNEL": kernel} if kernel else {}))
        self.ms, self.rss, self.hash, self.kernel = [], 0, None, None

    def run(self):
        done = subprocess.run(self.command, capture_output=True, text=True, env=self.environment)
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        answer = json.loads(done.stdout)
        self.ms.append(answer["cpu_ms_median"])
        self.rss, self.hash, self.kernel = answer["peak_rss_mib"], answer["output_sha256"], answer["kernel"]

    def close(self):
        pass


def main(binary, directory, rounds, names):
    import numpy as np

    head = ("network", "ORT float", "ORT int8", "tract", "AVX2", "best", "ratio", "MiB ORT", "MiB", "bits")
    print("{:<22} {:>9} {:>9} {:>9} {:>9} {:>9} {:>7} {:>8} {:>6}  {}".format(*head), flush=True)
    for name in names:
        plain, qdq, qop = (Path(directory) / f"{name}{tag}.onnx" for tag in ("", ".qdq", ".qop"))
        runners = {"float": Runtime(plain), "int8": Runtime(qdq), "operators": Runtime(qop),
                   "tract": Scanside(binary, qdq, "--tract"), "ours": Scanside(binary, qdq)}
        if os.uname().machine == "x86_64":
            runners["avx2"] = Scanside(binary, qdq, kernel="avx2")
        for _ in range(rounds):
            for runner in runners.values():
                runner.run()
        ms = {key: statistics.median(runner.ms) for key, runner in runners.items()}
        int8 = min(("int8", "operators"), key=ms.get)
        best = min(("float", int8), key=ms.get)
        expected = [np.asarray(y, dtype="<f4").tobytes() for y in open_runtime(str(qop), False)()]
        twin = Scanside(binary, qop)  # Quantizers do not always give the QDQ file the same scales.
        twin.run()
        same = hashlib.sha256(b"".join(expected)).hexdigest() == twin.hash
        for runner in runners.values():
            runner.close()
        print(f"{name:<22} {ms['float']:>9.2f} {ms[int8]:>9.2f} {ms['tract']:>9.2f} {ms.get('avx2', 0):>9.2f} "
              f"{ms['ours']:>9.2f} {ms[best] / ms['ours']:>6.2f}x {runners[best].rss:>8.0f} {runners['ours'].rss:>6.0f}  "
              f"{'same' if same else 'differ'} ({runners['ours'].kernel})", flush=True)


def hashes(directory, names):
    """Prints the expected output hash of each network: the golden values of the tests."""
    import numpy as np

    for name in names:
        outputs = open_runtime(str(Path(directory) / f"{name}.qop.onnx"), False)()
        digest = hashlib.sha256(b"".join(np.asarray(y, dtype="<f4").tobytes() for y in outputs)).hexdigest()
        print(f"{name} {digest}")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    elif sys.argv[1] == "hashes":
        hashes(sys.argv[2], sys.argv[3:])
    else:
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])
