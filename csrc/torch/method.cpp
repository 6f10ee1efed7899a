// The parts of a method, made from their numbers in Python.

#include "method.h"

#include <algorithm>

namespace flashode {

Row::Row(const std::vector<double>& entries) {
  for (size_t j = 0; j < entries.size(); ++j) {
    if (entries[j] == 0) continue;
    stage.push_back(int(j));
    weight.push_back(entries[j]);
  }
}

Table::Table(const std::vector<double>& c, const std::vector<std::vector<double>>& a,
             const std::vector<double>& b, const std::vector<double>& b_err, bool fsal)
    : c(c), a(a.begin(), a.end()), b(b), b_err(b_err), fsal(fsal) {}

Interpolant::Interpolant(const std::vector<std::vector<double>>& all,
                         const std::vector<double>& extra_c,
                         const std::vector<std::vector<double>>& extra_a)
    : extra_c(extra_c), extra_a(extra_a.begin(), extra_a.end()) {
  for (size_t j = 0; j < all.size(); ++j) {
    if (std::all_of(all[j].begin(), all[j].end(), [](double w) { return w == 0; })) continue;
    stage.push_back(int(j));
    weights.push_back(all[j]);
  }
}

std::vector<double> Interpolant::at(double x) const {
  std::vector<double> values;
  for (const std::vector<double>& coefficients : weights) {
    double w = 0;  // Horner
    for (auto term = coefficients.rbegin(); term != coefficients.rend(); ++term) w = (w + *term) * x;
    values.push_back(w);
  }
  return values;
}

}  // namespace flashode
