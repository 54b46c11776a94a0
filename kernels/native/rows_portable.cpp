// The kernels for one set of instructions; setup.py sets the compiler's flags for it.
#include <stdint.h>
#include <string.h>

#include "job.h"
#include "lanes_portable.h"
#include "rows.h"
#include "state_rows.h"

const Implementation kPortable = {settle, settle_states, make_blocks};
