// Which memory a step writes and reads, and whether any of it meets.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace fastlr {

class Overlaps {
 public:
  // Notes memory that an update writes ...
  void writes(const void* data, int64_t bytes) {
    if (bytes != 0) written_.push_back(range(data, bytes));
  }
  // ... and that it reads, as the gradient of the parameter that begins there.
  void reads(const void* data, int64_t bytes, const void* parameter) {
    if (bytes != 0) read_.push_back({range(data, bytes), static_cast<const char*>(parameter)});
  }
  // Whether the order of the updates matters: one writes memory that another writes, or reads.
  bool found();
  // Begins a step. What the last one found is kept, for what has not moved since.
  void clear() {
    written_.clear();
    read_.clear();
  }

 private:
  using Bytes = std::pair<const char*, const char*>;  // from the first to one past the last
  // A gradient, and where its own parameter begins.
  struct Read {
    Bytes bytes;
    const char* parameter;

    bool operator==(const Read& other) const {
      return bytes == other.bytes && parameter == other.parameter;
    }
  };

  static Bytes range(const void* data, int64_t bytes) {
    const char* const begin = static_cast<const char*>(data);
    return {begin, begin + bytes};
  }
  bool reads_what_another_writes(const Read& read) const;

  std::vector<Bytes> written_;
  std::vector<Read> read_;
  // As they were when it was found.
  std::vector<Bytes> written_seen_;
  std::vector<Bytes> written_sorted_;
  std::vector<Read> read_seen_;
  bool writes_meet_ = false;
  bool found_ = false;
};

}  // namespace fastlr
