// All that a generated program includes.
#pragma once

#include "evaluate.h"
#include "own_clocks.h"
#include "solve.h"
