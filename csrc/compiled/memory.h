// Memory of a solve: work space that is taken once, and lists that grow with the steps. Nothing
// here throws: what cannot be had is null, and the solve says so.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace flashode {

constexpr size_t kAlignment = 64;

// n values, uninitialised, aligned for vectors; null if there is no memory.
template <class T>
T* allocate(int64_t n) {
  const size_t bytes = (size_t(n) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
  return static_cast<T*>(std::aligned_alloc(kAlignment, bytes ? bytes : kAlignment));
}

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(allocate<T>(n)) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  T* data() const { return data_; }

 private:
  T* const data_;
};

// Items that are only ever added; of plain data.
template <class T>
class List {
 public:
  List() = default;
  List(const List&) = delete;
  List& operator=(const List&) = delete;
  ~List() { std::free(items_); }

  // False if there is no memory.
  bool add(const T& item) {
    if (size_ == capacity_ && !grow()) return false;
    items_[size_++] = item;
    return true;
  }
  int64_t size() const { return size_; }
  const T* data() const { return items_; }
  T& operator[](int64_t i) { return items_[i]; }
  const T& operator[](int64_t i) const { return items_[i]; }

 private:
  bool grow() {
    const int64_t capacity = capacity_ ? 2 * capacity_ : 64;
    T* const items = static_cast<T*>(std::realloc(items_, size_t(capacity) * sizeof(T)));
    if (!items) return false;
    items_ = items, capacity_ = capacity;
    return true;
  }

  T* items_ = nullptr;
  int64_t size_ = 0, capacity_ = 0;
};

// Rows of equal length that stay where they are.
template <class T>
class Rows {
 public:
  explicit Rows(int64_t length) : length_(length) {
    const int64_t bytes = length * int64_t(sizeof(T));
    per_block_ = bytes >= kBlock ? 1 : kBlock / (bytes ? bytes : 1);
  }
  ~Rows() {
    for (int64_t i = 0; i < blocks_.size(); ++i) std::free(blocks_[i]);
  }

  // One more row, uninitialised; null if there is no memory.
  T* add() {
    if (size_ == blocks_.size() * per_block_) {
      T* const block = allocate<T>(per_block_ * length_);
      if (!block || !blocks_.add(block)) return std::free(block), nullptr;
    }
    return (*this)[size_++];
  }
  int64_t size() const { return size_; }
  T* operator[](int64_t n) const { return blocks_[n / per_block_] + n % per_block_ * length_; }

 private:
  static constexpr int64_t kBlock = 1 << 16;  // bytes, or one row

  const int64_t length_;
  int64_t per_block_, size_ = 0;
  List<T*> blocks_;
};

}  // namespace flashode
