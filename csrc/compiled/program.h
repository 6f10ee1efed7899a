// All that a generated program includes.
#pragma once

#include "evaluate.h"
#include "own_clocks.h"
#include "product.h"
#include "pull_back.h"
#include "reverse.h"
#include "reverse_batch.h"
#include "solve.h"
#include "sweep.h"
