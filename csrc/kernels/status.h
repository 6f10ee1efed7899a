// How a solve ends; the numbers of flashode.errors.Status.
#pragma once

namespace flashode {

enum Status {
  kRunning = -1,
  kSuccess = 0,
  kMaxSteps = 1,
  kStepUnderflow = 2,
  kNonfiniteField = 3,
  kNonfiniteState = 4,
  kNonfiniteError = 6,
};

}  // namespace flashode
