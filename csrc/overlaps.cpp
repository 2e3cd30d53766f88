#include "overlaps.h"

#include <algorithm>

namespace fastlr {

// Of sorted writes that do not meet each other.
bool Overlaps::reads_what_another_writes(const Read& read) const {
  auto write = std::upper_bound(written_sorted_.begin(), written_sorted_.end(), read.bytes.first,
                                [](const char* at, const Bytes& w) { return at < w.second; });
  for (; write != written_sorted_.end() && write->first < read.bytes.second; ++write) {
    if (write->first != read.parameter) return true;
  }
  return false;
}

// Found anew only for what has moved, which gradients often do.
bool Overlaps::found() {
  const bool moved = written_ != written_seen_;
  if (moved) {
    written_seen_ = written_;
    written_sorted_ = written_;
    std::sort(written_sorted_.begin(), written_sorted_.end());
    writes_meet_ = false;
    for (size_t i = 1; i < written_sorted_.size(); ++i) {
      writes_meet_ = writes_meet_ || written_sorted_[i].first < written_sorted_[i - 1].second;
    }
  }
  const bool all_anew = moved || found_ || read_.size() != read_seen_.size();
  if (!all_anew && read_ == read_seen_) return found_;
  found_ = writes_meet_;
  for (size_t i = 0; i < read_.size() && !found_; ++i) {
    if (all_anew || !(read_[i] == read_seen_[i])) found_ = reads_what_another_writes(read_[i]);
  }
  read_seen_ = read_;
  return found_;
}

}  // namespace fastlr
