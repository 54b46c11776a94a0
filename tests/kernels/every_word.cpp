// The largest error of the transform over every 32-bit word, in units in the last place:
// `every_word lengths` or `every_word directions`. Compiled and run by test_accuracy.py.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "job.h"
#if defined(__AVX512F__)
#include "lanes_avx512.h"
#elif defined(__AVX2__)
#include "lanes_avx2.h"
#else
#include "lanes_portable.h"
#endif
#include "chacha.h"
#include "normals.h"

static double error(float got, double exact) {
  int exponent;
  frexp(exact, &exponent);
  return fabs(got - exact) / ldexp(1.0, exponent - 24);
}

int main(int, char **arguments) {
  const bool lengths = strcmp(arguments[1], "lengths") == 0;
  const Key key = {};
  const Words input[4] = {words(0), words(0), words(0), words(0)};
  double worst = 0;
  // words below 2^20 take 32 more bits; the upper three bits of an angle only turn and mirror
  const uint64_t first = lengths ? kTailBelow : 0, last = uint64_t{1} << (lengths ? 32 : 29);
  for (uint64_t start = first; start < last; start += kLanes) {
    uint32_t word[kLanes];
    float one[kLanes], other[kLanes];
    for (int i = 0; i < kLanes; ++i) word[i] = static_cast<uint32_t>(start + i);
    Floats a, b;
    if (lengths) {  // turned by the smallest angle there is, whose cosine is 1
      box_muller(key, input, 20, 0, load(word), words(0), a, b);
    } else {
      const Words quarter = bit_or(shift_left<2>(load(word)), words(2));
      const Floats x = mul(to_float(quarter), floats(0x1p-31f)), y = mul(x, x);
      a = fma(x, floats(kSinHigh), mul(x, polynomial(kSin, y)));
      b = fma(y, polynomial(kCos, y), floats(1.0f));
    }
    store(one, a);
    store(other, b);
    for (int i = 0; i < kLanes; ++i) {
      if (lengths) {
        const bool upper = word[i] >> 31 != 0;
        const double near = ((upper ? ~word[i] : word[i]) | 1) * 0x1p-32;
        worst = fmax(worst, error(one[i], sqrt(-2 * (upper ? log1p(-near) : log(near)))));
      } else {
        const double t = static_cast<int32_t>(word[i] << 2 | 2) * (M_PI / 4 * 0x1p-31);
        worst = fmax(worst, fmax(error(one[i], sin(t)), error(other[i], cos(t))));
      }
    }
  }
  printf("%.4f\n", worst);
}
