// Draws tokens: the largest of logit / temperature + Gumbel noise over the tokens that are kept, the noise a hash of
// seed, position and token. src/gossamer/engine/draw.py defines it and is the oracle; this is the same, quicker.
#pragma once

#include <cstdint>
#include <vector>

namespace gossamer {

struct DrawParams {
  double temperature;  // 0: the likeliest
  int64_t top_k;       // 0: all
  double top_p, min_p;
  uint64_t seed;
  int64_t position;
};

// One thread's memory for it, kept from row to row.
class Drawer {
 public:
  // The token drawn from logits [vocab_size > 0], or -1 if they are not finite.
  int64_t draw(const float* logits, int64_t vocab_size, const DrawParams&);

 private:
  struct Candidate {
    float logit, weight;  // weight: exp((logit - best) / temperature)
    int64_t token;
  };
  static bool likelier(const Candidate& a, const Candidate& b);
  static int64_t crossing(Candidate* first, int64_t count, double target);

  bool find_best();
  double weigh_all();
  double weigh_candidates();
  float least_of_top_k();
  void gather_logits(float least);
  void gather_weights(float least);
  void truncate();
  void keep_top_p(double target);
  int64_t contest() const;

  const float* logits_;
  int64_t size_;
  DrawParams params_;
  float best_;  // the largest logit, its token, and log2(e) / temperature
  int64_t best_token_;
  float slope_;
  std::vector<float> maxima_, sorted_, weights_;  // of each block of logits, likewise, of each token
  std::vector<Candidate> candidates_, undecided_;
  int64_t count_;  // of candidates
};

}  // namespace gossamer
