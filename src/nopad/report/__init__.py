"""Reports as one HTML page."""

from nopad.report.align import align_page, write_align_page
from nopad.report.bench import bench_page, write_bench_page
from nopad.report.parts import histogram, line_chart, near_one, scientific

__all__ = [
    "align_page",
    "bench_page",
    "histogram",
    "line_chart",
    "near_one",
    "scientific",
    "write_align_page",
    "write_bench_page",
]
