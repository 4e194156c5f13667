// SPDX-License-Identifier: Apache-2.0
// The emulator itself: right code gives right numbers under every schedule, and each kind of
// mistake that it promises to find is reported by name.
#include "testing.h"
#include "wgmma.cuh"

using testing::check_contains;

namespace {

// What the emulator says of the kernel; empty if nothing.
template <class Kernel>
std::string report(unsigned blocks, unsigned threads, size_t shared, Kernel kernel) {
  try {
    emu::Grid(dim3(blocks), dim3(threads), shared, kernel).run();
  } catch (const emu::Failure& failure) {
    return failure.what();
  }
  return "";
}

float* shared_floats() { return reinterpret_cast<float*>(ey::cuda::ptx::dynamic_shared()); }

}  // namespace

TEST(barriers_order_writes_and_reads) {
  std::vector<float> out(3 * 64);
  const auto reverse = [&](bool with_barrier) {
    return report(3, 64, 64 * sizeof(float), [&, with_barrier] {
      const unsigned i = threadIdx.x;
      shared_floats()[i] = float(i + 100 * blockIdx.x);
      if (with_barrier) __syncthreads();
      out[blockIdx.x * 64 + i] = shared_floats()[63 - i];
    });
  };
  CHECK(reverse(true).empty());
  for (unsigned i = 0; i < out.size(); ++i) CHECK(out[i] == float(63 - i % 64 + 100 * (i / 64)));
  CHECK(reverse(false).empty());
  int poisoned = 0;
  for (float f : out) poisoned += std::isnan(f);
  CHECK(poisoned > 0);
}

TEST(the_seed_decides_the_schedule) {
  const auto order = [](uint64_t seed) {
    emu::options.seed = seed;
    std::vector<unsigned> seen;
    report(2, 40, 0, [&] { seen.push_back(threadIdx.x + 100 * blockIdx.x); });
    return seen;
  };
  const uint64_t before = emu::options.seed;
  CHECK(order(1) == order(1));
  CHECK(order(1) != order(2));
  emu::options.seed = before;
}

TEST(shuffles_move_values_between_lanes) {
  std::vector<int> swapped(32), up(32);
  CHECK(report(1, 32, 0, [&] {
          const int lane = int(threadIdx.x);
          swapped[size_t(lane)] = __shfl_xor_sync(0xffffffffu, lane, 5);
          up[size_t(lane)] = __shfl_up_sync(0xffffffffu, lane, 4);
        }).empty());
  for (int lane = 0; lane < 32; ++lane) {
    CHECK(swapped[size_t(lane)] == (lane ^ 5));
    CHECK(up[size_t(lane)] == (lane < 4 ? lane : lane - 4));
  }
}

TEST(lanes_that_part_ways_are_reported) {
  check_contains(report(1, 32, 0,
                        [] {
                          if (threadIdx.x < 16) {
                            __syncwarp();
                          } else {
                            __shfl_xor_sync(0xffffffffu, 1, 1);
                          }
                        }),
                 "lanes of one warp meet in");
  check_contains(report(1, 32, 0,
                        [] {
                          if (threadIdx.x != 3) __syncwarp();
                        }),
                 "31 lanes in __syncwarp");
}

TEST(a_barrier_that_not_everyone_reaches_is_reported) {
  check_contains(report(1, 64, 0,
                        [] {
                          if (threadIdx.x != 40) __syncthreads();
                        }),
                 "barrier 0 has 63 of 64");
}

TEST(waiting_for_ever_is_reported) {
  emu::options.most_steps_without_progress = 10000;
  volatile int flag = 0;
  check_contains(report(1, 2, 0,
                        [&] {
                          while (flag == 0) emu::grid->yield();
                        }),
                 "livelock");
  emu::options.most_steps_without_progress = 20'000'000;
}

TEST(resident_blocks_can_wait_for_each_other) {
  const int before = emu::options.resident_blocks;
  emu::options.resident_blocks = 4;
  int arrived = 0;
  CHECK(report(4, 32, 0, [&] {
          if (threadIdx.x == 0) {
            atomicAdd(&arrived, 1);
            while (arrived < 4) emu::grid->yield();
          }
          __syncthreads();
        }).empty());
  emu::options.resident_blocks = before;
}

TEST(writes_past_shared_memory_are_reported) {
  check_contains(report(1, 1, 100, [] { ey::cuda::ptx::dynamic_shared()[100] = 1; }),
                 "written past its end");
}

TEST(asynchronous_copies_arrive_at_the_wait) {
  alignas(16) float from[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  std::vector<float> early, late;
  CHECK(report(1, 1, 64, [&] {
          ey::cuda::ptx::copy16_async(shared_floats(), from, true);
          ey::cuda::ptx::copy_commit();
          ey::cuda::ptx::copy16_async(shared_floats() + 4, from + 4, false);
          ey::cuda::ptx::copy_commit();
          early.assign(shared_floats(), shared_floats() + 8);
          ey::cuda::ptx::copy_wait<1>();
          CHECK(shared_floats()[3] == 4 && std::isnan(shared_floats()[4]));
          ey::cuda::ptx::copy_wait<0>();
          late.assign(shared_floats(), shared_floats() + 8);
        }).empty());
  for (float f : early) CHECK(std::isnan(f));
  CHECK((late == std::vector<float>{1, 2, 3, 4, 0, 0, 0, 0}));

  check_contains(report(1, 1, 64,
                        [&] {
                          ey::cuda::ptx::copy16_async(shared_floats(), from, true);
                          ey::cuda::ptx::copy_commit();
                        }),
                 "has not waited for");
  check_contains(
      report(1, 1, 64, [&] { ey::cuda::ptx::copy16_async(shared_floats() + 1, from, true); }),
      "not a multiple of its bytes");
  check_contains(report(1, 1, 64, [&] { ey::cuda::ptx::copy16_async(from, from, true); }),
                 "not in shared memory");
}

TEST(mma_multiplies_small_integers_exactly) {
  std::mt19937 random(3);
  const auto small = [&] { return float(int(random() % 17) - 8); };
  float a[16][16], b[16][8], d[16][8];
  for (auto& row : a) {
    for (float& v : row) v = small();
  }
  for (auto& row : b) {
    for (float& v : row) v = small();
  }
  const auto pack = [](float low, float high) {
    return uint32_t(ey::cuda::ptx::float_to_bf16(low)) |
           uint32_t(ey::cuda::ptx::float_to_bf16(high)) << 16;
  };
  CHECK(report(1, 32, 0, [&] {
          const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
          float sums[4] = {1, 1, 1, 1};
          ey::cuda::ptx::mma_bf16(
              sums, pack(a[g][2 * t], a[g][2 * t + 1]), pack(a[g + 8][2 * t], a[g + 8][2 * t + 1]),
              pack(a[g][2 * t + 8], a[g][2 * t + 9]),
              pack(a[g + 8][2 * t + 8], a[g + 8][2 * t + 9]), pack(b[2 * t][g], b[2 * t + 1][g]),
              pack(b[2 * t + 8][g], b[2 * t + 9][g]));
          d[g][2 * t] = sums[0];
          d[g][2 * t + 1] = sums[1];
          d[g + 8][2 * t] = sums[2];
          d[g + 8][2 * t + 1] = sums[3];
        }).empty());
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = 1;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      CHECK(d[row][column] == sum);
    }
  }
}

namespace {

namespace ptx = ey::cuda::ptx;

constexpr int kPanelBytes = 128 * 128;

uint64_t* barrier_behind(int bytes) {
  return reinterpret_cast<uint64_t*>(ptx::dynamic_shared() + bytes);
}

uint32_t pair_of(float low, float high) {
  return uint32_t(ptx::float_to_bf16(low)) | uint32_t(ptx::float_to_bf16(high)) << 16;
}

}  // namespace

TEST(bulk_copies_arrive_at_the_barrier) {
  alignas(16) float from[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  std::vector<float> late;
  CHECK(report(1, 64, 128, [&] {
          uint64_t* const barrier = barrier_behind(64);
          if (threadIdx.x == 0) {
            ptx::barrier_init(barrier, 1);
            ptx::barriers_are_set();
          }
          __syncthreads();
          if (threadIdx.x == 0) {
            ptx::barrier_arrive_expecting(barrier, 32);
            ptx::copy_bulk(shared_floats(), from, 32, barrier);
            CHECK(std::isnan(shared_floats()[0]));
          }
          ptx::barrier_wait(barrier, 0);
          if (threadIdx.x == 40) late.assign(shared_floats(), shared_floats() + 8);
        }).empty());
  CHECK((late == std::vector<float>{1, 2, 3, 4, 5, 6, 7, 8}));

  const auto one_thread = [&](auto&& act) {
    return report(1, 1, 128, [&] {
      ptx::barrier_init(barrier_behind(64), 1);
      act(barrier_behind(64));
    });
  };
  check_contains(
      one_thread([&](uint64_t* barrier) { ptx::copy_bulk(shared_floats(), from, 32, barrier); }),
      "ended with bulk copies under way");
  check_contains(
      one_thread([&](uint64_t* barrier) { ptx::copy_bulk(shared_floats(), from, 24, barrier); }),
      "not a multiple of 16 bytes");
  check_contains(one_thread([&](uint64_t* barrier) {
                   barrier[0] = ~uint64_t(0);
                   ptx::barrier_arrive(barrier);
                 }),
                 "a barrier is used that was not set");
  check_contains(one_thread([&](uint64_t* barrier) {
                   ptx::barrier_init(barrier, 1);
                   ptx::barrier_arrive_expecting(barrier, 16);
                   ptx::barrier_arrive(barrier);
                 }),
                 "more arrivals than it expects");
  check_contains(one_thread([&](uint64_t*) { ptx::shared_address(from); }), "not in shared memory");
}

TEST(wgmma_multiplies_small_integers_exactly) {
  std::mt19937 random(5);
  const auto small = [&] { return float(int(random() % 17) - 8); };
  static float a[64][16], b[128][64], d[64][128];  // tokens are rows of 64 k, of which 16 are used
  for (auto& row : a) {
    for (float& v : row) v = small();
  }
  for (auto& row : b) {
    for (float& v : row) v = small();
  }
  constexpr int kFirst = 32;  // of the 16 k
  CHECK(report(1, 128, kPanelBytes, [&] {
          char* const panel = ptx::dynamic_shared();
          const int thread = int(threadIdx.x), g = thread % 32 / 4, t = thread % 4;
          for (int k = 0; k < 64; k += 2) {  // thread: the token
            const uint32_t pair = pair_of(b[thread][k], b[thread][k + 1]);
            std::memcpy(panel + ptx::panel_offset(thread, k / 8) + k % 8 * 2, &pair, 4);
          }
          ptx::fence_for_async();
          __syncthreads();
          const int row = thread / 32 * 16 + g;
          const uint32_t weights[4] = {pair_of(a[row][2 * t], a[row][2 * t + 1]),
                                       pair_of(a[row + 8][2 * t], a[row + 8][2 * t + 1]),
                                       pair_of(a[row][2 * t + 8], a[row][2 * t + 9]),
                                       pair_of(a[row + 8][2 * t + 8], a[row + 8][2 * t + 9])};
          float sums[16][4];
          ptx::wgmma_fence();
          ptx::wgmma_bf16(sums, weights, ptx::token_matrix(panel + kFirst * 2), false);
          ptx::wgmma_bf16(sums, weights, ptx::token_matrix(panel + kFirst * 2), true);
          ptx::wgmma_commit();
          ptx::wgmma_wait<0>();
          for (int n = 0; n < 16; ++n) {
            for (int i = 0; i < 4; ++i) d[row + i / 2 * 8][8 * n + 2 * t + i % 2] = sums[n][i];
          }
        }).empty());
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 128; ++column) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][kFirst + k];
      CHECK(d[row][column] == 2 * sum);
    }
  }
}

TEST(wgmma_of_e4m3_multiplies_small_integers_exactly_and_cuts_off_small_terms) {
  std::mt19937 random(6);
  static float a[64][32], b[128][128],
      d[64][128];  // tokens are rows of 128 k, of which 32 are used
  for (auto& row : a) {
    for (float& v : row) v = float(int(random() % 17) - 8);
  }
  for (auto& row : b) {
    for (float& v : row) v = float(int(random() % 17) - 8);
  }
  constexpr int kFirst = 64;  // of the 32 k
  CHECK(report(1, 128, kPanelBytes, [&] {
          char* const panel = ptx::dynamic_shared();
          const int thread = int(threadIdx.x), g = thread % 32 / 4, t = thread % 4;
          const auto four = [](const float* v) {
            return ptx::floats_to_e4m3(v[0], v[1], v[2], v[3]);
          };
          for (int k = 0; k < 128; k += 4) {  // thread: the token
            const uint32_t codes = four(&b[thread][k]);
            std::memcpy(panel + ptx::panel_offset(thread, k / 16) + k % 16, &codes, 4);
          }
          ptx::fence_for_async();
          __syncthreads();
          const int row = thread / 32 * 16 + g;
          const uint32_t weights[4] = {four(&a[row][4 * t]), four(&a[row + 8][4 * t]),
                                       four(&a[row][16 + 4 * t]), four(&a[row + 8][16 + 4 * t])};
          float sums[16][4];
          ptx::wgmma_fence();
          ptx::wgmma_e4m3(sums, weights, ptx::token_matrix(panel + kFirst), false);
          ptx::wgmma_e4m3(sums, weights, ptx::token_matrix(panel + kFirst), true);
          ptx::wgmma_commit();
          ptx::wgmma_wait<0>();
          for (int n = 0; n < 16; ++n) {
            for (int i = 0; i < 4; ++i) d[row + i / 2 * 8][8 * n + 2 * t + i % 2] = sums[n][i];
          }
        }).empty());
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 128; ++column) {
      float sum = 0;
      for (int k = 0; k < 32; ++k) sum += a[row][k] * b[column][kFirst + k];
      CHECK(d[row][column] == 2 * sum);
    }
  }
  float one[32] = {256}, other[32] = {256};
  one[1] = 1, other[1] = 7.5f;
  CHECK(ptx::add_e4m3(one, other, 0) == 65536);  // 16 bits of a sum, less than 8 is cut off
  CHECK(ptx::add_e4m3(one, other, 9) == 65536 + 8);
}

TEST(e4m3_is_rounded_to_the_nearest_even_code) {
  for (uint32_t code = 0; code < 127; ++code) {
    const float value = ptx::e4m3_to_float(code), next = ptx::e4m3_to_float(code + 1);
    CHECK(ptx::float_to_e4m3(value) == code);
    CHECK(ptx::float_to_e4m3(-value) == (code | 128));
    if (code == 126) continue;  // NaN is next
    const float middle = (value + next) / 2;
    CHECK(ptx::float_to_e4m3(middle) == code + code % 2);
    CHECK(ptx::float_to_e4m3(std::nextafter(middle, 0.0f)) == code);
    CHECK(ptx::float_to_e4m3(std::nextafter(middle, 500.0f)) == code + 1);
  }
  CHECK(ptx::float_to_e4m3(1e9f) == 126 && ptx::float_to_e4m3(-INFINITY) == 254);
  CHECK(ptx::float_to_e4m3(NAN) == 127);
}

TEST(some_warps_meet_without_the_others) {
  const std::string met = report(1, 96, 64, [] {
    if (threadIdx.x >= 32) ptx::sync_some(1, 64);
  });
  CHECK(met.empty());
  check_contains(report(1, 96, 64, [] { ptx::sync_some(1, 65); }), "not whole warps");
}

TEST(wgmma_that_could_meet_other_data_is_reported) {
  alignas(16) static const char zeros[16] = {};
  const auto products = [&](bool fence, bool same, bool wait, bool tell) {
    return report(1, 128, kPanelBytes + 1024, [=] {
      char* const panel = ptx::dynamic_shared();
      if (threadIdx.x == 0) ptx::barrier_init(barrier_behind(kPanelBytes), 1);
      __syncthreads();
      for (int i = 0; i < 8; ++i) {
        ptx::copy16_async(panel + threadIdx.x * 128 + i * 16, zeros, true);
      }
      ptx::copy_commit();
      ptx::copy_wait<0>();
      if (tell || threadIdx.x != 77) ptx::fence_for_async();
      __syncthreads();
      float sums[16][4];
      const uint32_t weights[4] = {};
      if (fence) ptx::wgmma_fence();
      ptx::wgmma_bf16(sums, weights, ptx::token_matrix(panel + (same || threadIdx.x < 96 ? 0 : 32)),
                      false);
      ptx::wgmma_commit();
      if (wait) ptx::wgmma_wait<0>();
    });
  };
  CHECK(products(true, true, true, true).empty());
  check_contains(products(false, true, true, true), "no wgmma_fence before it");
  check_contains(products(true, false, true, true), "issue different products");
  check_contains(products(true, true, false, true), "exits with wgmma");
  check_contains(products(true, true, true, false), "written without fence_for_async");
}

int main(int argc, char** argv) { return testing::main_of(argc, argv); }
