"""Messages of any type with a header become locations and values, or are refused with a reason."""

import math

import numpy as np
import pytest
from cmanp_ros.msg import Observations
from conftest import wait_for
from geometry_msgs.msg import Vector3
from hypothesis import given, settings
from hypothesis import strategies as st
from sensor_msgs.msg import (
    BatteryState,
    FluidPressure,
    Illuminance,
    Imu,
    JointState,
    MagneticField,
    PointCloud2,
    Range,
    RelativeHumidity,
    Temperature,
)
from std_msgs.msg import Header

from cmanp_ros.conversions import MessageError, cloud_from_points, message_from_observations
from cmanp_ros.core.errors import ConfigError
from cmanp_ros.parameters import NodeParameters, SourceParameters
from cmanp_ros.sources import reader_for, value_at

THERE, IN_MAP = Header(frame_id='sensor'), Header(frame_id='/map')


def reader(type_name, dim_x=2, dim_y=1, node=None, **values):
    """Return a reader of a source called 'gauge'."""
    source = SourceParameters('gauge', type=type_name, **values)
    return reader_for(source, NodeParameters(**node or {}), dim_x, dim_y)


def refused(type_name, **values):
    """Return the text of the error that a source must raise."""
    with pytest.raises(ConfigError) as caught:
        reader(type_name, **values)
    return str(caught.value)


def message_error(function, *arguments):
    """Return the error that a call must raise."""
    with pytest.raises(MessageError) as caught:
        function(*arguments)
    return caught.value


def sound(value, **limits):
    """Return a reading of a range sensor that sees from 0.5 to 3 m."""
    return Range(header=THERE, range=value, **{'min_range': 0.5, 'max_range': 3.0, **limits})


@pytest.mark.parametrize(
    'message, value',
    [
        (Temperature(header=THERE, temperature=21.5), 21.5),
        (FluidPressure(header=THERE, fluid_pressure=101325.0), 101325.0),
        (RelativeHumidity(header=THERE, relative_humidity=0.75), 0.75),
        (Illuminance(header=THERE, illuminance=300.0), 300.0),
        (sound(2.0), 2.0),
        (MagneticField(header=THERE, magnetic_field=Vector3(x=2.0, y=-3.0, z=6.0)), 7.0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_known_sensor_gives_its_reading_at_the_origin_of_its_frame(message, value):
    gauge = reader(f'sensor_msgs/msg/{type(message).__name__}')
    assert gauge.message_type is type(message)
    reading = gauge.read(message)
    assert reading.header == THERE
    np.testing.assert_array_equal(reading.x, np.zeros((1, 3)))
    np.testing.assert_array_equal(reading.y, [[value]])
    assert (reading.rejected, reading.value_is_height) == ({}, False)


@pytest.mark.parametrize('dim_x', [1, 2, 3])
def test_locations_in_the_map_frame_have_as_many_axes_as_the_map(dim_x):
    gauge = reader('sensor_msgs/msg/Temperature', dim_x)
    assert gauge.read(Temperature(header=IN_MAP)).x.shape == (1, dim_x)
    cloud = cloud_from_points({name: np.arange(5.0) for name in 'xyz'}, IN_MAP)
    assert reader('sensor_msgs/msg/PointCloud2', dim_x).read(cloud).x.shape == (5, dim_x)


@pytest.mark.parametrize(
    'path, value',
    [
        ('angular_velocity.y', -3.0),
        ('angular_velocity', 7.0),
        ('linear_acceleration_covariance[5]', 11.0),
        ('header.stamp.sec', 13.0),
    ],
)
def test_value_field_is_a_path_into_the_message(path, value):
    message = Imu(header=THERE, angular_velocity=Vector3(x=2.0, y=-3.0, z=6.0))
    message.header.stamp.sec = 13
    message.linear_acceleration_covariance[5] = 11.0
    assert reader('sensor_msgs/msg/Imu', value_field=path).read(message).y.tolist() == [[value]]


def test_element_of_a_list_is_read_and_a_missing_one_refused():
    gauge = reader('sensor_msgs/msg/JointState', value_field='effort[1]')
    message = JointState(header=THERE, effort=[2.0, 3.0])
    assert gauge.read(message).y.tolist() == [[3.0]]
    error = message_error(gauge.read, JointState(header=THERE, effort=[2.0]))
    assert error.reason == 'missing_element'
    assert "'effort[1]': [1] is asked of 1 elements" in str(error)


def test_value_that_is_no_number_is_refused():
    message = BatteryState(header=THERE, present=True, serial_number='7')
    for path, kind in (('present', 'bool'), ('serial_number', 'str'), ('header', 'Header')):
        error = message_error(value_at, message, path)
        assert error.reason == 'not_numeric'
        assert f'{path!r} is of type {kind}; expected a number' in str(error)
        text = refused('sensor_msgs/msg/BatteryState', value_field=path)
        assert f'gauge.value_field does not fit sensor_msgs/msg/BatteryState: {error}' == text
    names = reader('sensor_msgs/msg/JointState', value_field='name[0]')
    assert message_error(names.read, JointState(name=['7'])).reason == 'not_numeric'
    whole = message_error(value_at, JointState(effort=[2.0]), 'effort')
    assert whole.reason == 'not_numeric'


@pytest.mark.parametrize(
    'path', ['a..b', '.a', 'a.', 'a[]', 'a[-1]', 'a[b]', 'a[0][1]', 'a()', '_a', 'a b', 'a["b"]']
)
def test_path_of_another_form_is_refused(path):
    text = refused('sensor_msgs/msg/Imu', value_field=path)
    assert f'gauge.value_field is {path!r}; expected names, dots and [index]' in text


@pytest.mark.parametrize(
    'path, text',
    [
        ('temprature', "Temperature has no field 'temprature'; did you mean 'temperature'?"),
        ('temperature.x', "'temperature.x': float has no field 'x'; it has none"),
        ('temperature[0]', '[0] is asked of float; expected a list there'),
        ('header.frame_id[0]', '[0] is asked of str; expected a list there'),
        ('get_fields_and_field_types', "no field 'get_fields_and_field_types'"),
        ('SLOT_TYPES[0]', "Temperature has no field 'SLOT_TYPES'"),
        ('header.stamp.real', "Time has no field 'real'; did you mean"),
    ],
)
def test_only_fields_that_the_message_defines_are_read(path, text):
    assert text in refused('sensor_msgs/msg/Temperature', value_field=path)
    assert message_error(value_at, Temperature(), path).reason == 'missing_field'


@pytest.mark.parametrize('path', ['__class__', 'header.__class__', 'header.__doc__[0]'])
def test_python_attributes_cannot_be_reached(path):
    assert 'expected names, dots and [index]' in refused('sensor_msgs/msg/Imu', value_field=path)
    assert message_error(value_at, Imu(), path).reason == 'missing_field'


@given(st.text(alphabet='headrstmp._[]0123 ', max_size=20))
@settings(deadline=None, max_examples=100)
def test_any_path_is_read_or_refused(path):
    try:
        value = value_at(Temperature(), path)
    except MessageError as error:
        assert error.reason in ('missing_field', 'missing_element', 'not_numeric')
    else:
        assert isinstance(value, float)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_is_rejected_and_counted(value):
    reading = reader('sensor_msgs/msg/Temperature').read(Temperature(temperature=value))
    assert (reading.x.shape, reading.y.shape) == ((0, 3), (0, 1))
    assert reading.rejected == {'not_finite': 1}


@pytest.mark.parametrize('value', [0.25, 3.5, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('path', ['', 'range'])
def test_range_beyond_its_limits_is_no_reading(value, path):
    reading = reader('sensor_msgs/msg/Range', value_field=path).read(sound(value))
    assert (reading.x.shape, reading.y.shape) == ((0, 3), (0, 1))
    assert reading.rejected == {'out_of_range': 1}


def test_limits_belong_to_the_range_and_a_fixed_distance_ranger_has_none():
    gauge = reader('sensor_msgs/msg/Range')
    assert [gauge.read(sound(value)).y.item() for value in (0.5, 3.0)] == [0.5, 3.0]
    fixed = sound(math.inf, min_range=math.inf, max_range=math.inf)
    assert gauge.read(fixed).rejected == {'out_of_range': 1}


def test_values_are_converted_to_field_units():
    kelvin = reader('sensor_msgs/msg/Temperature', value_scale=2, value_offset=273.0)
    assert kelvin.read(Temperature(temperature=21.5)).y.tolist() == [[316.0]]
    x, y = np.arange(10.0).reshape(5, 2), np.arange(15.0).reshape(5, 3)
    several = reader('cmanp_ros/msg/Observations', dim_y=3, value_scale=-2.0, value_offset=7.0)
    reading = several.read(message_from_observations(x, y, THERE))
    np.testing.assert_array_equal(reading.x, x)
    np.testing.assert_array_equal(reading.y, 7 - 2 * y)
    large = reader('sensor_msgs/msg/Temperature', value_scale=1e300)
    assert large.read(Temperature(temperature=1e300)).y.item() == math.inf


def test_cloud_takes_the_value_field_of_its_source_or_that_of_the_node():
    columns = {name: np.arange(5.0) + 10 * i for i, name in enumerate(['x', 'y', 'z', 'gas'])}
    cloud = cloud_from_points(columns, THERE)
    height = reader('sensor_msgs/msg/PointCloud2').read(cloud)
    np.testing.assert_array_equal(height.x, np.stack([columns[name] for name in 'xyz'], axis=-1))
    np.testing.assert_array_equal(height.y[:, 0], columns['z'])
    own = reader('sensor_msgs/msg/PointCloud2', value_field='gas').read(cloud)
    of_node = reader('sensor_msgs/msg/PointCloud2', node={'value_field': 'gas'}).read(cloud)
    np.testing.assert_array_equal(own.y[:, 0], columns['gas'])
    np.testing.assert_array_equal(of_node.y, own.y)
    error = message_error(reader('sensor_msgs/msg/PointCloud2', value_field='no2').read, cloud)
    assert (error.reason, "no field 'no2'" in str(error)) == ('missing_field', True)


def test_points_nearer_than_min_range_are_left_out_and_counted():
    x = np.array([[0, 0, 0], [0.2, 0.2, 0.2], [3, 4, 0], [0, 0, np.nan], [0.5, 0, 0]])
    columns = dict(zip('xyz', x.T, strict=True))
    near = reader('sensor_msgs/msg/PointCloud2', min_range=0.5)
    reading = near.read(cloud_from_points(columns, THERE))
    np.testing.assert_array_equal(reading.x, x[[2, 4]])
    np.testing.assert_array_equal(reading.y, x[[2, 4], 2:])
    assert reading.rejected == {'too_near': 2, 'not_finite': 1}
    in_map = near.read(cloud_from_points(columns, IN_MAP))
    assert len(in_map.x) == 4 and 'too_near' not in in_map.rejected, 'the map has no sensor in it'
    with pytest.raises(ConfigError, match=r'min_range is 0\.5, but sensor_msgs/msg/Temperature'):
        reader('sensor_msgs/msg/Temperature', min_range=0.5)


@pytest.mark.parametrize(
    'header, field, dim_x, expected',
    [
        (THERE, 'z', 2, True),
        (IN_MAP, 'z', 2, False),
        (THERE, 'y', 2, False),
        (THERE, 'z', 3, False),
    ],
)
def test_height_in_another_frame_is_told_from_other_values(header, field, dim_x, expected):
    cloud = cloud_from_points({name: np.arange(5.0) for name in 'xyz'}, header)
    gauge = reader('sensor_msgs/msg/PointCloud2', dim_x, value_field=field, value_scale=3)
    assert gauge.read(cloud).value_is_height == expected
    np.testing.assert_array_equal(gauge.scaled(np.arange(5.0)), 3 * np.arange(5.0))


def test_limits_of_the_node_hold():
    cloud = cloud_from_points({name: np.arange(7.0) for name in 'xyz'}, THERE)
    few = {'max_points': 5}
    for message in (cloud, message_from_observations(np.zeros((7, 2)), np.zeros((7, 1)), THERE)):
        type_name = f'{type(message).__module__.split(".")[0]}/msg/{type(message).__name__}'
        error = message_error(reader(type_name, node=few).read, message)
        assert error.reason == 'too_many_points'


def test_single_values_do_not_fit_a_model_of_several():
    gauge = reader('sensor_msgs/msg/Temperature', dim_y=3)
    error = message_error(gauge.read, Temperature(header=THERE))
    assert error.reason == 'wrong_dim'
    assert "source 'gauge' has 1 number per value; expected 3" in str(error)


@pytest.mark.parametrize(
    'type_name, text',
    [
        ('Temperature', "gauge.type is 'Temperature'; expected package/msg/Name"),
        ('sensor_msgs/Temperature', 'expected package/msg/Name, such as'),
        ('sensor_msgs/srv/SetCameraInfo', 'expected package/msg/Name, such as'),
        ('os.path/msg/Name', 'expected package/msg/Name, such as'),
        (
            'no_such_msgs/msg/Gas',
            'the package no_such_msgs is not found (No module named',
        ),
        ('no_such_msgs/msg/Gas', 'no-such-msgs, or source the workspace that has it'),
        ('json/msg/Gas', 'the package json is not found'),
        (
            'sensor_msgs/msg/Temprature',
            "sensor_msgs has no such message; did you mean 'Temperature'?",
        ),
        ('std_msgs/msg/Float32', 'which has no std_msgs/Header: where and when it was read is'),
        ('geometry_msgs/msg/Vector3', 'which has no std_msgs/Header'),
        (
            'sensor_msgs/msg/Imu',
            "gauge.value_field is '', but the reading of sensor_msgs/msg/Imu is not known; "
            'expected the path of a number below one of its fields: header, orientation,',
        ),
    ],
)
def test_type_that_cannot_be_read_is_refused_with_the_way_out(type_name, text):
    assert text in refused(type_name)


def test_observations_have_no_value_field():
    text = refused('cmanp_ros/msg/Observations', value_field='y')
    assert "gauge.value_field is 'y'; expected none" in text


def test_default_sources_are_those_of_before():
    parameters = NodeParameters()
    types = [reader_for(s, parameters, 2, 1).message_type for s in parameters.source_parameters]
    assert types == [PointCloud2, Observations]


def test_message_over_ros_is_read(client):
    gauge = reader('sensor_msgs/msg/MagneticField', value_field='magnetic_field.z')
    received = client.collect(gauge.message_type, 'gauge', 10)
    message = MagneticField(header=THERE, magnetic_field=Vector3(x=2.0, y=-3.0, z=6.0))
    client.publisher(MagneticField, 'gauge').publish(message)
    wait_for(lambda: received)
    reading = gauge.read(received[0])
    assert (reading.header.frame_id, reading.y.tolist()) == ('sensor', [[6.0]])
