// Winograd's minimal filtering F(4x4, 3x3): how 36 products make 16 sums of nine products each. No torch in this file.
//
//     y = A' [(G w G') * (B' d B)] A        d: 6x6 pixels, w: 3x3 weights, y: 4x4 sums, *: value by value
//
// The polynomials are taken at 0, +-1/sqrt(2), +-sqrt(2) and infinity, which round less than whole numbers do. knife/ops.py holds
// the same three matrices. A value is a row of neighbouring channels, which never mix here: a vector of GCC and clang, cut into
// those of the machine.
#pragma once

#include <cstdint>

namespace knife::winograd {

constexpr int64_t kTile = 4;                  // pixels of a side that are made at once
constexpr int64_t kPatch = kTile + 2;         // pixels of a side that they are made of
constexpr int64_t kPoints = kPatch * kPatch;  // products
constexpr int64_t kLanes = 16;                // channels of a row

using Row = float __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));

constexpr float kNear = 0.70710678118654752f, kFar = 1.41421356237309505f;  // the points; their squares are 1/2 and 2

// B' d: six values, `step` rows apart, become six.
inline void spread(const Row* d, int64_t step, Row* out) {
  const Row d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
  const Row even_near = d4 - 2.0f * d2, odd_near = kNear * (d3 - 2.0f * d1);
  const Row even_far = d4 - 0.5f * d2, odd_far = kFar * (d3 - 0.5f * d1);
  out[0] = d0 - 2.5f * d2 + d4;
  out[step] = even_near + odd_near;
  out[2 * step] = even_near - odd_near;
  out[3 * step] = even_far + odd_far;
  out[4 * step] = even_far - odd_far;
  out[5 * step] = d1 - 2.5f * d3 + d5;
}

// A' m: six values become four.
inline void gather(const Row* m, int64_t step, Row* out) {
  const Row even_near = m[step] + m[2 * step], odd_near = kNear * (m[step] - m[2 * step]);
  const Row even_far = m[3 * step] + m[4 * step], odd_far = kFar * (m[3 * step] - m[4 * step]);
  out[0] = m[0] + even_near + even_far;
  out[step] = odd_near + odd_far;
  out[2 * step] = 0.5f * even_near + 2.0f * even_far;
  out[3 * step] = 0.5f * odd_near + 2.0f * odd_far + m[5 * step];
}

// B' d B of a patch of 6x6 rows, in place.
inline void spread_patch(Row* d) {
  Row half[kPoints];
  for (int64_t column = 0; column < kPatch; ++column) spread(d + column, kPatch, half + column);
  for (int64_t row = 0; row < kPatch; ++row) spread(half + row * kPatch, 1, d + row * kPatch);
}

// A' m A of 6x6 rows, into 4x4.
inline void gather_patch(const Row* m, Row* y) {
  Row half[kTile * kPatch];
  for (int64_t column = 0; column < kPatch; ++column) gather(m + column, kPatch, half + column);
  for (int64_t row = 0; row < kTile; ++row) gather(half + row * kPatch, 1, y + row * kTile);
}

}  // namespace knife::winograd
