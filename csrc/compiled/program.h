// All that a generated program includes.
#pragma once

#include "batches.h"
#include "evaluate.h"
#include "product.h"
#include "pull_back.h"
#include "reverse.h"
#include "reverse_batch.h"
#include "sweep.h"
#include "tiles.h"
