from swalp.report import costs
from swalp.training.profile import BETWEEN, ArmCost, LayerCost

FLOAT = ArmCost(
    arm="float",
    layers=(
        LayerCost("0", "Conv2d", 4096, 2**21, 0.010, 0.020, 0.001, 0.0),
        LayerCost("1", "ReLU", 0, 2**21, 0.001, 0.002, 0.0, 0.0),
        LayerCost("2", "Linear", 1000, 0, 0.002, 0.003, 0.001, 0.0),
        LayerCost(BETWEEN, "", 0, 100, 0.0, 0.0, 0.0, 0.0),
    ),
    loading=0.001,
    forward=0.012,
    backward=0.025,
    optimizer=0.002,
    state_bytes=5096,
)
LOW = ArmCost(
    arm="low",
    layers=(LayerCost("0", "Conv2d", 1024, 2**20, 0.010, 0.020, 0.010, 0.010),),
    loading=0.001,
    forward=0.020,
    backward=0.049,
    optimizer=0.010,
    state_bytes=1300,
)

EXPECTED = """\
float
layer       kind    parameters    saved   forward  backward  optimizer    share  quantizing
----------  ------  ----------  -------  --------  --------  ---------  -------  ----------
0           Conv2d     4.0 KiB  2.0 MiB  10.00 ms  20.00 ms    1.00 ms   77.5 %
2           Linear      1000 B            2.00 ms   3.00 ms    1.00 ms   15.0 %
(2 more)                        2.0 MiB   1.00 ms   2.00 ms               7.5 %
----------  ------  ----------  -------  --------  --------  ---------  -------  ----------
all layers             5.0 KiB  4.0 MiB  13.00 ms  25.00 ms    2.00 ms  100.0 %

low
layer       kind    parameters    saved   forward  backward  optimizer    share  quantizing
----------  ------  ----------  -------  --------  --------  ---------  -------  ----------
0           Conv2d     1.0 KiB  1.0 MiB  10.00 ms  20.00 ms   10.00 ms  100.0 %        25 %
----------  ------  ----------  -------  --------  --------  ---------  -------  ----------
all layers             1.0 KiB  1.0 MiB  10.00 ms  20.00 ms   10.00 ms  100.0 %        25 %

a step of  loading   forward  backward  optimizer      step  ratio  parameters  momentum    saved
---------  -------  --------  --------  ---------  --------  -----  ----------  --------  -------
float      1.00 ms  12.00 ms  25.00 ms    2.00 ms  40.00 ms   1.00     5.0 KiB   5.0 KiB  4.0 MiB
low        1.00 ms  20.00 ms  49.00 ms   10.00 ms  80.00 ms   2.00     1.0 KiB   1.3 KiB  1.0 MiB

what it was"""


def test_tables():
    assert costs.render([FLOAT, LOW], layers=2, about="what it was") == EXPECTED


def test_bytes_have_fitting_units():
    counts = (0, 12, 1023, 1024, 3 * 2**20, 5 * 2**30)
    assert [costs._bytes(count) for count in counts] == [
        "",
        "12 B",
        "1023 B",
        "1.0 KiB",
        "3.0 MiB",
        "5.0 GiB",
    ]
