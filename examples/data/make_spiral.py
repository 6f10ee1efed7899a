"""Writes spiral.csv, the data of ../spiral.py, from the closed form: no solver under test has a hand in it.

dy/dt = A y with A = [[-0.1, -1], [1, -0.1]] and y(0) = (2, 0) turns by one radian and shrinks by the factor
e^-0.1 per unit of time. Rows are unevenly spaced, as measurements are; x and y carry Gaussian noise.
Usage: python make_spiral.py > spiral.csv
"""

import math
import random

ROWS, DURATION, NOISE = 200, 25.0, 0.03


def main():
    draw = random.Random(2018)
    gap = DURATION / (ROWS - 1)
    print("t,x,y")
    for row in range(ROWS):
        inner = 0 < row < ROWS - 1
        t = round(gap * (row + (draw.uniform(-0.4, 0.4) if inner else 0)), 4)
        radius = 2 * math.exp(-0.1 * t)
        x, y = radius * math.cos(t), radius * math.sin(t)
        print(f"{t:.4f},{x + draw.gauss(0, NOISE):.4f},{y + draw.gauss(0, NOISE):.4f}")


if __name__ == "__main__":
    main()
