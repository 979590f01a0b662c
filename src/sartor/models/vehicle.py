"""Models of a small racing car: what its speeds do, by tyres or by kinematics, and a network for what these leave out.

    v_x' = (F_xr + F_xf cosδ - F_yf sinδ - drag)/m + v_y r,   drag = c_0 + c_1 v_x + c_2 v_x²
    v_y' = (F_yr + F_yf cosδ + F_xf sinδ)/m - v_x r
    r'   = (l_f (F_yf cosδ + F_xf sinδ) - l_r F_yr)/I
    α_f  = atan((v_y + l_f r)/v_x) - δ,   α_r = atan((v_y - l_r r)/v_x),   σ = (w - v)/v  along a wheel            (D24)

with the speed w of the tyres' surface, the same at all wheels, the steering angle δ, and loads at rest. Below
`SLOWEST` the speed in denominators is held there, and δ in α_f fades with v_x: a car that stands feels no force.

Source: the vehicle of the code of Węgrzynowski et al., Learning What Matters, with l_r at the rear axle.
"""

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sartor.models.network import Network

Scalar = Float[Array, ""]
Rates = Float[Array, "3"]

GRAVITY = 9.81  # [m/s²]
SLOWEST = 0.8  # [m/s]


class Motion(NamedTuple):
    """What the forces on a car depend on."""

    vx: Scalar
    """Forward speed [m/s]."""
    vy: Scalar
    """Speed to the left [m/s]."""
    r: Scalar
    """Yaw rate [rad/s], positive to the left."""
    friction: Scalar
    """Of the ground, times which all tyre forces act."""
    wheel: Scalar
    """Speed of the tyres' surface [m/s]."""
    steer: Scalar
    """Steering angle δ [rad], positive to the left."""


class Body(NamedTuple):
    """All but the tyres."""

    mass: Any = 5.1  # [kg]
    inertia: Any = 0.14583  # about the vertical axis [kg m²]
    lf: Any = 0.15683  # from the centre of mass to the front axle [m]
    lr: Any = 0.17317  # to the rear axle [m]
    drag: Any = (8.477e-4, 5.926e-4, 2.761e-4)  # of 1, v_x and v_x² [N, N s/m, N s²/m²]
    wheel_lag: Any = 0.0461  # time constant of the wheels' speed [s]
    steer_lag: Any = 0.0437  # of the steering angle [s]

    @property
    def loads(self) -> tuple[Any, Any]:
        """On the front and the rear axle at rest [N]."""
        weight = self.mass * GRAVITY / (self.lf + self.lr)
        return weight * self.lr, weight * self.lf


class AbstractTyre(eqx.Module):
    """Two wheels of an axle."""

    def forces(self, load: Scalar, slip: Scalar, angle: Scalar) -> tuple[Scalar, Scalar]:
        """Forward and to the left [N] on ground with friction 1, for a load [N], slip σ and slip angle α [rad]."""
        raise NotImplementedError


class Pacejka(AbstractTyre):
    """The magic formula with combined slip by similarity:

        ρ² = (σ/σ_p)² + (α/α_p)²,   F_x = F_z (σ/σ_p)/ρ D_x(ρ σ_p),   F_y = -F_z (α/α_p)/ρ D_y(ρ α_p)
        D(a) = D sin(C atan(B a + E (B a - atan(B a))))

    with α in degrees. (In the textbook the sign before E is minus.)

    Source: Pacejka, Tire and Vehicle Dynamics, 2012, chapter 4.
    """

    slip_peak: Any
    """σ_p."""
    angle_peak: Any
    """α_p [deg]."""
    lateral: Any
    """(B_y [1/deg], C_y, D_y, E_y)."""
    longitudinal: Any
    """(B_x, C_x, D_x, E_x)."""

    def forces(self, load: Scalar, slip: Scalar, angle: Scalar) -> tuple[Scalar, Scalar]:
        """By the formula above."""
        sx, sa = slip / self.slip_peak, jnp.rad2deg(angle) / self.angle_peak
        rho = jnp.sqrt(sx**2 + sa**2 + 1e-12)  # smooth where a wheel rolls
        along = load * sx / rho * _magic(rho * self.slip_peak, self.longitudinal)
        return along, -load * sa / rho * _magic(rho * self.angle_peak, self.lateral)


class LinearTyre(AbstractTyre):
    """F_x = F_z c_σ σ,   F_y = -F_z c_α α: what a user without tyre data has. Its forces know no limit.

    c_α is that of the front tyre in f1tenth_gym; c_σ is a guess of the same size.
    """

    slip_stiffness: Any = 6.0
    """c_σ."""
    angle_stiffness: Any = 4.718
    """c_α [1/rad]."""

    def forces(self, load: Scalar, slip: Scalar, angle: Scalar) -> tuple[Scalar, Scalar]:
        """By the formula above."""
        return load * self.slip_stiffness * slip, -load * self.angle_stiffness * angle


class AbstractVehicle(eqx.Module):
    """What a controller believes of its car."""

    body: eqx.AbstractVar[Body]
    """All but the tyres."""

    def rates(self, motion: Motion) -> Rates:
        """d/dt of (v_x, v_y, r)."""
        raise NotImplementedError


class SingleTrack(AbstractVehicle):
    """Both wheels of an axle in one: (D24)."""

    front: AbstractTyre
    """Of the front axle."""
    rear: AbstractTyre
    """Of the rear axle."""
    body: Body = Body()
    """All but the tyres."""

    def rates(self, motion: Motion) -> Rates:
        """By (D24)."""
        return self.rates_under(motion, *self.body.loads)

    def rates_under(self, motion: Motion, front_load: Scalar, rear_load: Scalar) -> Rates:
        """The same with other loads on the axles [N]."""
        vx, vy, r, friction, wheel, steer = motion
        body, cos, sin = self.body, jnp.cos(steer), jnp.sin(steer)
        fast = jnp.maximum(vx, SLOWEST)
        rolling = vx * cos + (vy + body.lf * r) * sin
        front_angle = jnp.arctan((vy + body.lf * r) / fast) - steer * jnp.clip(vx / SLOWEST, 0.0, 1.0)
        rear_angle = jnp.arctan((vy - body.lr * r) / fast)
        xf, yf = self.front.forces(
            friction * front_load, (wheel - rolling) / jnp.maximum(rolling, SLOWEST), front_angle
        )
        xr, yr = self.rear.forces(friction * rear_load, (wheel - vx) / fast, rear_angle)
        side = yf * cos + xf * sin
        drag = body.drag[0] * jnp.clip(vx / SLOWEST, -1.0, 1.0) + body.drag[1] * vx + body.drag[2] * vx**2
        return jnp.stack([
            (xr + xf * cos - yf * sin - drag) / body.mass + vy * r,
            (yr + side) / body.mass - vx * r,
            (body.lf * side - body.lr * yr) / body.inertia,
        ])  # fmt: skip


class Kinematic(AbstractVehicle):
    """No slip: r = v_x tanδ/(l_f + l_r) and v_y = l_r r, as rates, and v_x follows the wheels with a lag."""

    body: Body = Body()
    """Its lengths and lags."""
    grip_lag: Any = 0.1
    """Time constant with which v_x follows the wheels, and r and v_y what the geometry says [s]."""

    def rates(self, motion: Motion) -> Rates:
        """Towards what rolling wheels do."""
        vx, vy, r, _, wheel, steer = motion
        turning = vx * jnp.tan(steer) / (self.body.lf + self.body.lr)
        return jnp.stack([wheel - vx, self.body.lr * turning - vy, turning - r]) / self.grip_lag


class Corrected(AbstractVehicle):
    """Another model plus a network of (v_x, v_y, r, w - v_x, δ), each in units of its usual size.

    A car is the same in a mirror: the network is used as  ½ (g(z) + M g(M z)),  M: change of the sign of v_y, r and δ.
    """

    known: ClassVar[tuple[str, ...]] = ("base",)
    """Never trained."""
    base: AbstractVehicle
    """What is known beforehand."""
    network: Network
    """g, from five numbers to three."""
    sizes: tuple[float, ...] = eqx.field(static=True, default=(3.0, 0.5, 3.0, 0.3, 0.3))
    """Of its inputs [m/s, m/s, rad/s, m/s, rad]."""
    answers: tuple[float, ...] = eqx.field(static=True, default=(4.0, 4.0, 20.0))
    """Of its outputs [m/s², m/s², rad/s²]."""

    @property
    def body(self) -> Body:  # pyright: ignore
        """Of the base."""
        return self.base.body

    def rates(self, motion: Motion) -> Rates:
        """Of both together."""
        vx, vy, r, _, wheel, steer = motion
        z = jnp.stack([vx, vy, r, wheel - vx, steer]) / jnp.asarray(self.sizes, vx.dtype)
        mirror = jnp.asarray([1.0, -1.0, -1.0, 1.0, -1.0], vx.dtype)
        straight, mirrored = jax.vmap(self.network)(jnp.stack([z, mirror * z]))
        learned = 0.5 * (straight + mirror[:3] * mirrored)
        return self.base.rates(motion) + learned * jnp.asarray(self.answers, vx.dtype)


def corrected(base: AbstractVehicle, width: int, key: Array) -> Corrected:
    """With a network of one hidden layer that adds nothing yet."""
    network = Network((5, width, 3), key)
    last = lambda network: [network.layers[-1].weight, network.layers[-1].bias]
    network = eqx.tree_at(last, network, [jnp.zeros_like(leaf) for leaf in last(network)])
    return Corrected(base=base, network=network)  # pyright: ignore[reportCallIssue]


def f1tenth() -> SingleTrack:
    """A car of 1:10 with the published tyres. Source: the code of Węgrzynowski et al., Learning What Matters."""
    front = Pacejka(0.12260, 8.1564, (0.057084, 0.58888, 0.85324, 0.23114), (2.83313, 0.68991, 0.80986, 0.00658))
    rear = Pacejka(0.13232, 7.5577, (0.069187, 0.59321, 0.86027, 4.28465), (4.67455, 1.57920, 0.85531, 7.29611))
    return SingleTrack(front=front, rear=rear)


def _magic(a: Scalar, shape: Any) -> Scalar:
    B, C, D, E = shape
    angle = jnp.arctan(B * a)
    return D * jnp.sin(C * jnp.arctan(B * a + E * (B * a - angle)))
